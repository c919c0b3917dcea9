"""The executor of a GPU, on one made of RAM: the right bytes, and nothing leaked or left hanging by a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.errors import ArgumentError, DeviceError, TransferError
from kvortex.transfer.executor import Completion, Direction
from tests.fake_driver import Result
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.pages import PagedCache, Tensor, assert_same, keys_of
from tests.transfer.profiles import H100
from tests.transfer.submitting import submit_blocks


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as made:
        yield made


def cache_of(kind: str) -> PagedCache:
    device = CudaDevice()
    if kind == "direct":
        return PagedCache(device, [Tensor(device, (12, H100.copy_bytes), 1)], 0)
    if kind == "odd":
        return PagedCache(device, [Tensor(device, (12, 333), 1, shift=1), Tensor(device, (2, 12, 77), 1, shift=3)], [0, 1])
    return PagedCache(device, [Tensor(device, (2, 12, 5, 60)) for _ in range(3)], 1)


@pytest.mark.parametrize("route", ["staged", "resident", "strided", "batched", "mapped", "auto"])
@pytest.mark.parametrize("staging", [4096, 3 * 4096, 1 << 20])
@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("kind", ["direct", "odd", "layers"])
def test_round_trip(
    gpu: FakeGpu, kind: str, streams: int, staging: int, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(kind)
    digests, added_up = streams == 1, staging == 4096
    if added_up:
        monkeypatch.setattr("kvortex.transfer.digesting.MOST_APART", 0)
    options = {"gpu_pool_size_bytes": 2 * H100.buffers * staging, "num_transfer_streams": streams, "transfer_route": route}
    options["digests"] = digests
    with cache.engine(slots=10, **options) as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(*range(10)), np.arange(10)[::-1]).wait().all()
        poisoned = cache.randomize()
        ticket = engine.load_blocks(keys_of(2, 9, 4), [11, 0, 3])
        assert ticket.wait().all() and ticket.seconds == 0.5e-3
        assert_same(cache.memory(), cache.expected(poisoned, before, [(7, 11), (0, 0), (5, 3)]))
        counted = [(entry.direction, entry.route) for entry in engine.get_stats().routes]
    name = "direct" if kind == "direct" else "mapped" if route == "auto" else route
    assert counted == [("save", name), ("load", name)]
    used = {"launch", "to_host", "to_device", "lines", "batch", "wait_value", "write_value"} & set(gpu.issued.names)
    copies = {"to_host", "to_device"}
    strided = {"odd": copies | {"lines"}, "layers": {"lines"}}  # of "odd" one tensor is a line by itself
    mapped = {"launch"}
    resident = copies | {"launch", "wait_value", "write_value"}
    wanted = {"staged": copies | {"launch"}, "resident": resident, "mapped": mapped, "auto": mapped, "batched": {"batch"}}
    wanted["strided"] = strided.get(kind, set())
    if route in ("staged", "resident") and "lines" in used:  # neighbours in slots that their records do not fill
        used = used - {"lines"} | copies
    moving = copies if kind == "direct" else wanted[route]
    if digests:  # which are read where no kernel moves bytes; where they are added up zeros are sent ahead, and sums fetched
        early = not added_up and (kind == "direct" or route == "strided")  # the kernel that reads waits for a flag
        moving = moving | {"launch"} | (copies if added_up else set()) | ({"write_value"} if early else set())
    assert used == moving


@pytest.mark.parametrize("route", ["staged", "resident"])
def test_no_byte_of_another_block_reaches_the_padding_of_a_slot(gpu: FakeGpu, route: str) -> None:
    """Staging buffers hold what earlier transfers left there: of layers it lies where later saves have their padding."""
    cache = cache_of("odd")
    secret, plain = 0x5E, 0x11
    with cache.engine(slots=10, transfer_route=route) as engine:
        lane = engine._executor._lanes[Direction.SAVE]
        arena, record = engine._parts.arena, cache.layout.record_bytes
        gpu.memory[int(lane.buffers.min())].array[:] = secret
        for tensor in cache.tensors:
            tensor.buffer.write(np.full(tensor.buffer.nbytes, plain, np.uint8))
        assert engine.save_blocks(keys_of(*range(10)), np.arange(10)).wait().all()
        for slot in range(10):
            view = arena.view(slot)
            assert (view[:record] == plain).all() and not view[record:].any()


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("route", ["staged", "resident", "strided"])
def test_lines_too_far_apart_for_a_rectangle(gpu: FakeGpu, route: str, layerwise: bool) -> None:
    """Slots of several GiB, whose beginnings alone are used; and fragments as far from each other."""
    gpu.max_pitch = 8191
    device = CudaDevice()
    cache = PagedCache(device, [Tensor(device, (3, 12, 333), 1, pad={0: 8192}), Tensor(device, (2, 12, 77), 1)], 1)
    with cache.engine(slots=10, transfer_route=route, max_block_bytes=8192, cpu_pool_size_bytes=10 * 8192) as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(*range(10)), np.arange(10)).wait().all()
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(*range(10)), np.arange(10), layerwise=layerwise).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(at, at) for at in range(10)]))


@pytest.mark.parametrize(("version", "name"), [(13000, "batch"), (13010, "batch"), (12080, "batch_12"), (12090, "batch_12")])
def test_one_batch_a_stream_in_the_form_that_the_driver_has(gpu: FakeGpu, version: int, name: str) -> None:
    """Over as many streams as there are for launches; where their number is less than that, over the least."""
    gpu.answers["cuDriverGetVersion"] = version
    for streams in (1, 7):
        cache = cache_of("layers")
        with cache.engine(slots=10, num_transfer_streams=streams, transfer_route="batched") as engine:
            before, wanted = cache.randomize(), max(streams, H100.buffers)
            gpu.issued.calls.clear()
            assert engine.save_blocks(keys_of(*range(10)), np.arange(10)).wait().all()
            saves = [call for call in gpu.issued.calls if call.name == name]
            assert len({call.stream for call in saves}) == len(saves) == wanted
            poisoned = cache.randomize()
            assert engine.load_blocks(keys_of(*range(5)), np.arange(5, 10)).wait().all()
            assert sum(call.name == name for call in gpu.issued.calls) == 2 * wanted
            assert_same(cache.memory(), cache.expected(poisoned, before, [(at, 5 + at) for at in range(5)]))


@pytest.mark.parametrize("lacks", ["old driver", "no such function", "an error"])
def test_a_driver_without_batches_gets_a_call_for_each_copy(gpu: FakeGpu, lacks: str) -> None:
    find = gpu.answers["cuGetProcAddress"]
    answer = (Result(0), 0, 1) if lacks == "no such function" else (Result(1), None, None)
    if lacks == "old driver":
        gpu.answers["cuDriverGetVersion"] = 12070
    else:
        gpu.answers["cuGetProcAddress"] = lambda name, *rest: answer if b"Batch" in name else find(name, *rest)
    cache = cache_of("odd")
    with cache.engine(slots=10, num_transfer_streams=3, transfer_route="batched", digests=False) as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(*range(10)), np.arange(10)).wait().all()
        assert gpu.issued.names.count("to_host") == 30 and not {"batch", "batch_12", "launch"} & set(gpu.issued.names)
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(0), [11]).wait().all() and gpu.issued.names.count("to_device") == 3
        assert_same(cache.memory(), cache.expected(poisoned, before, [(0, 11)]))
        assert {entry.route for entry in engine.get_stats().routes} == {"batched"}


@pytest.mark.parametrize(("known", "wanted"), [(True, [4, 1]), (False, [1] * 5)])
def test_blocks_that_touch_are_one_copy_where_they_surely_are_one_allocation(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, known: bool, wanted: list[int]
) -> None:
    cache = PagedCache(CudaDevice(), [Tensor(CudaDevice(), (12, 4096), 1)], 0)
    if not known:
        monkeypatch.setattr(CudaDevice, "allocation", lambda *_: None)
    with cache.engine(slots=12, num_transfer_streams=1, transfer_route="batched") as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(*range(5)), [3, 4, 5, 6, 0]).wait().all()
        calls = [call for call in gpu.issued.calls if call.name == "batch"]
        sizes = [size for call in calls for size in call.parameters[2 * call.arguments[3] : 3 * call.arguments[3]]]
        assert sizes == [4096 * blocks for blocks in wanted]
        poisoned = cache.randomize()
        assert engine.load_blocks(keys_of(1, 4), [9, 10]).wait().all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(4, 9), (0, 10)]))


def test_opaque_buffers(gpu: FakeGpu) -> None:
    cache = cache_of("odd")
    with cache.engine(max_block_bytes=5000) as engine:
        source = cache.device.allocate(9000)
        data = np.random.default_rng(0).integers(0, 256, 9000, np.uint8)
        source.write(data)
        assert engine.save_blocks(keys_of(1, 2), [source.address + 1, source.address + 5001], [5000, 7]).wait().all()
        source.write(np.zeros(9000, np.uint8))
        assert engine.load_blocks(keys_of(2, 1), [source.address, source.address + 7], [7, 5000]).wait().all()
        assert_same([source.read()], [np.concatenate([data[5001:5008], data[1:5001], np.zeros(3993, np.uint8)])])


def test_everything_is_given_back(gpu: FakeGpu) -> None:
    cache = cache_of("layers")
    kept = set(gpu.memory)
    with cache.engine() as engine:
        engine.save_blocks(keys_of(1), [1]).wait()
        assert len(gpu.memory) > len(kept)
    assert set(gpu.memory) == kept
    made = len(gpu.named("cuEventCreate")), len(gpu.named("cuStreamCreateWithPriority")), len(gpu.named("cuModuleLoadData"))
    assert made == tuple(len(gpu.named(name)) for name in ("cuEventDestroy", "cuStreamDestroy", "cuModuleUnload"))
    assert len(gpu.named("cuCtxPushCurrent")) == len(gpu.named("cuCtxPopCurrent"))
    assert len(gpu.named("cuMemHostRegister")) == len(gpu.named("cuMemHostUnregister"))


def test_events_and_ids_are_used_again(gpu: FakeGpu) -> None:
    with cache_of("layers").engine() as engine:
        taken = []
        for turn in range(5):
            engine.save_blocks(keys_of(turn), [turn]).wait()
            taken.append((len(gpu.named("cuEventCreate")), len(gpu.memory)))
        assert len(set(taken)) == 1


def submit(engine: Any, block: int = 1) -> Completion:
    return submit_blocks(engine._executor, Direction.SAVE, np.array([block]), np.array([block]), None)


def test_a_transfer_runs_until_its_event_has_passed(gpu: FakeGpu) -> None:
    with cache_of("layers").engine() as engine:
        gpu.event_code = 600
        completion = submit(engine)
        assert not completion.query() and completion.seconds == 0.0
        completion.add_to(0x77, 20)
        assert gpu.named("cuStreamWaitEvent") == [(0x77, completion._events[1], 0)]
        with pytest.raises(ArgumentError):
            completion.add_to("stream", 20)
        gpu.event_code = 0
        assert completion.query() and completion.seconds == 0.5e-3
        completion.add_to(0x78, 20)
        assert len(gpu.named("cuStreamWaitEvent")) == 1, "nothing to wait for any more"


def test_a_gpu_that_fails_during_a_transfer(gpu: FakeGpu) -> None:
    with cache_of("layers").engine() as engine:
        ticket = engine.save_blocks(keys_of(1), [1])
        gpu.event_code = 700
        assert not ticket.wait().any()
        assert str(ticket.error).startswith("the GPU failed during a transfer: CUDA_ERROR_ILLEGAL_ADDRESS (700)")
        assert engine.get_stats().reserved_blocks == 0


def test_a_context_that_is_gone_ends_the_transfer(gpu: FakeGpu) -> None:
    """As after ``cudaDeviceReset`` by another library: no event can be asked any more, and the slots are free."""
    with cache_of("layers").engine() as engine:
        gpu.event_code = 600
        ticket = engine.save_blocks(keys_of(1), [1])
        assert not ticket.done()
        gpu.fails["cuCtxSetCurrent"] = (709, 0)
        assert not ticket.wait().any() and "CONTEXT_IS_DESTROYED" in str(ticket.error)
        assert engine.get_stats().reserved_blocks == 0
        gpu.fails.clear()


def test_a_transfer_whose_time_cannot_be_read_has_still_been_done(gpu: FakeGpu) -> None:
    with cache_of("layers").engine() as engine:
        gpu.fails["cuEventElapsedTime"] = (1, 0)
        ticket = engine.save_blocks(keys_of(1), [1])
        assert ticket.wait().all() and ticket.error is None and ticket.seconds == 0.0


@pytest.mark.parametrize("at", range(40))
@pytest.mark.parametrize("route", ["staged", "resident", "batched"])
def test_a_refusal_while_issuing_is_a_failed_transfer_and_nothing_more(gpu: FakeGpu, at: int, route: str) -> None:
    """A resident kernel that was launched gets all its flags, whatever else is refused: it would wait for ever."""
    cache = cache_of("layers")
    with cache.engine(num_transfer_streams=2, transfer_route=route) as engine:
        gpu.issued.fails[at] = 700
        ticket = engine.save_blocks(keys_of(*range(6)), np.arange(6))
        assert at < len(gpu.issued.calls) or at > 15
        if at < len(gpu.issued.calls) and gpu.issued.names[at] == "write_value":
            gpu.resident.clear()  # the context is gone when even that fails, and the kernel with it
        failed = not ticket.wait().all()
        assert failed == (ticket.error is not None) and ticket.mask.any() == (not failed)
        assert failed == (gpu.issued.names[at : at + 1] not in ([], ["pop"])), "of no use but to put the context back"
        if failed:
            assert "a save of" in str(ticket.error) and "could not be issued: CUDA_ERROR_ILLEGAL_ADDRESS" in str(ticket.error)
        gpu.issued.fails.clear()
        before = cache.randomize()
        if not failed:
            return
        assert engine.save_blocks(keys_of(*range(6)), np.arange(6)).wait().all(), "the next transfer is not affected"
        assert engine.load_blocks(keys_of(0), [11]).wait().all()
        assert_same(cache.memory(), cache.expected(before, before, [(0, 11)]))


def test_when_no_event_can_be_recorded_the_work_is_waited_for(gpu: FakeGpu) -> None:
    """Nothing else would say when the slots are free."""
    with cache_of("layers").engine(transfer_route="staged") as engine:
        gpu.issued.fails.update({at: 700 for at in range(3, 100)})
        gpu.answers["cuStreamQuery"] = lambda _: (Result(600),)
        completion = submit(engine)
        assert not completion.query(), "the streams are still busy"
        with pytest.raises(TransferError, match="no event"):
            completion.add_to(0x77, 1)
        del gpu.answers["cuStreamQuery"]
        assert completion.query() and "ILLEGAL_ADDRESS" in str(completion.error)
        asked = {stream for (stream,) in gpu.named("cuStreamQuery")}
        assert asked >= set(engine._executor._lanes[Direction.SAVE]._streams)


@pytest.mark.parametrize(("function", "spare"), [("cuEventCreate", 0), ("cuEventCreate", 1), ("cuMemHostAlloc", 0)])
def test_a_transfer_that_cannot_be_prepared_fails_and_leaks_nothing(gpu: FakeGpu, function: str, spare: int) -> None:
    with cache_of("layers").engine() as engine:
        for _ in range(100):  # more than are ready
            engine._executor._ids.take(1)
        gpu.fails[function] = (2, len(gpu.named(function)) + spare)
        with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
            submit(engine)
        ticket = engine.save_blocks(keys_of(1), [1])
        assert not ticket.wait().any() and "could not be prepared" in str(ticket.error)
        assert engine.get_stats().reserved_blocks == 0
        gpu.fails.clear()
        events = engine._executor._events
        assert sorted(events._free) == sorted(events._all)


OPENING = ["cuMemPoolCreate", "cuMemAllocFromPoolAsync", "cuMemHostAlloc", "cuMemAlloc", "cuModuleLoadData",
           "cuModuleGetFunction", "cuStreamCreateWithPriority", "cuEventCreate", "cuCtxGetStreamPriorityRange"]  # fmt: skip


@pytest.mark.parametrize("function", OPENING)
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_an_engine_that_cannot_be_opened_leaves_nothing(gpu: FakeGpu, function: str, spare: int) -> None:
    cache = cache_of("layers")
    kept = set(gpu.memory)
    before = {name: len(gpu.named(name)) for name in OPENING}
    gpu.fails[function] = (2, before[function] + spare)
    try:
        cache.engine(num_transfer_streams=2).shutdown()
    except DeviceError as error:
        assert "CUDA_ERROR_OUT_OF_MEMORY" in str(error)
    assert set(gpu.memory) == kept
    failed = {name: 0 for name in OPENING} | {function: max(0, len(gpu.named(function)) - before[function] - spare)}
    for create, destroy in (("cuStreamCreateWithPriority", "cuStreamDestroy"), ("cuEventCreate", "cuEventDestroy")):
        assert len(gpu.named(create)) - failed[create] == len(gpu.named(destroy)), f"{destroy} is missing"
    assert len(gpu.named("cuMemHostRegister")) == len(gpu.named("cuMemHostUnregister"))


def test_shutdown_after_a_gpu_fault_gives_the_host_memory_back(gpu: FakeGpu) -> None:
    """Every call of the driver fails then; the pinned pool must go all the same, and no error may hide the first one."""
    cache = cache_of("layers")
    engine = cache.engine()
    for name in ("cuMemFree", "cuMemFreeHost", "cuMemFreeAsync", "cuMemHostUnregister", "cuEventDestroy", "cuStreamDestroy"):
        gpu.fails[name] = (700, 0)
    parts = engine._parts
    engine.shutdown()
    assert parts.arena._mapping is None and not parts.arena._registered
    gpu.fails.clear()


@pytest.mark.parametrize("code", [1, 2, 600, 900, 906])
def test_a_question_that_fails_is_no_end(gpu: FakeGpu, code: int) -> None:
    """While another thread captures a graph a query may be refused; the work behind the event still runs."""
    with cache_of("layers").engine() as engine:
        gpu.event_code = code
        ticket = engine.save_blocks(keys_of(1), [1])
        assert not ticket.done() and engine.get_stats().reserved_blocks == 1
        gpu.event_code = 0
        gpu.fails["cuCtxSetCurrent"] = (900, 0)
        assert not ticket.done()
        gpu.fails.clear()
        assert ticket.wait().all()


def test_streams_under_capture_are_refused(gpu: FakeGpu) -> None:
    """Their events would pull our streams into the graph, and the transfer would run at every replay, or never."""
    with cache_of("layers").engine() as engine:
        gpu.capturing[7] = "CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE"
        with pytest.raises(ArgumentError, match="captured into a CUDA graph"):
            engine.save_blocks(keys_of(1), [1], stream=7)
        gpu.answers["cuStreamIsCapturing"] = lambda _: (Result(906), 0)
        with pytest.raises(ArgumentError, match="pass stream="):
            engine.load_blocks(keys_of(1), [1])
        assert engine.get_stats().reserved_blocks == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_around_the_issue(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A signal that comes inside the compiled call is told when that returns, with everything on its way."""
    from kvortex.transfer.issue import submitting

    real = submitting._streamed

    def interrupted(*arguments: Any) -> None:
        if when == "after":
            real(*arguments)
        raise KeyboardInterrupt

    with cache_of("layers").engine() as engine:
        monkeypatch.setattr(submitting, "_streamed", interrupted)
        gpu.event_code = 600
        with pytest.raises(KeyboardInterrupt):
            engine.save_blocks(keys_of(1), [1])
        monkeypatch.undo()
        held = 1 if when == "after" else 0
        assert engine.get_stats().reserved_blocks == held, "a slot that is being written must not be given to others"
        gpu.event_code = 0
        assert engine.check_blocks(keys_of(1)).tolist() == [bool(held)]
        assert engine.get_stats().reserved_blocks == 0
        assert sorted(engine._executor._events._free) == sorted(engine._executor._events._all)


def test_a_busy_stream_is_given_the_route_that_needs_no_multiprocessor(gpu: FakeGpu) -> None:
    cache = PagedCache(CudaDevice(), [Tensor(CudaDevice(), (8, 24, 4, 4096)) for _ in range(2)], 1)
    copies, blocks = {"lines", "batch", "launch"}, np.arange(20)  # 5 MiB, for which a kernel is worth it
    for code, wanted in ((600, "lines"), (0, "launch")):
        gpu.issued.calls.clear()
        gpu.answers["cuStreamQuery"] = lambda stream, code=code: (Result(0 if stream else code),)  # the caller's is the default
        with cache.engine(slots=24, digests=False) as engine:
            before = cache.randomize()
            assert engine.save_blocks(keys_of(*blocks), blocks).wait().all()
            assert engine.load_blocks(keys_of(*blocks), 23 - blocks).wait().all()
            assert_same(cache.memory(), cache.expected(before, before, [(at, 23 - at) for at in blocks.tolist()]))
        assert wanted in gpu.issued.names and copies & set(gpu.issued.names) == {wanted}


@pytest.mark.parametrize("version", [13000, 12060])
def test_long_fragments_that_lie_unevenly_leave_a_busy_gpu_in_batches(gpu: FakeGpu, version: int) -> None:
    gpu.answers["cuDriverGetVersion"] = version
    gpu.answers["cuStreamQuery"] = lambda stream: (Result(0 if stream else 600),)
    device = CudaDevice()
    cache = PagedCache(device, [Tensor(device, (12, (64 << 10) + 16 * at), 1) for at in range(3)], 0)
    with cache.engine() as engine:
        before = cache.randomize()
        assert engine.save_blocks(keys_of(1, 2, 3), [4, 11, 0]).wait().all()
        assert engine.load_blocks(keys_of(2), [7]).wait().all()
        assert_same(cache.memory(), cache.expected(before, before, [(11, 7)]))
        assert {entry.route for entry in engine.get_stats().routes} == {"batched" if version == 13000 else "mapped"}
