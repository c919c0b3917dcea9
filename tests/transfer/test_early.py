"""Short loads by copy engines, digested by a kernel that is launched while their DMAs move: which loads, what is issued, and
what that is ordered after."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvortex
from kvortex.devices.cuda import CudaDevice
from kvortex.transfer import digesting as dg
from kvortex.transfer.executor import Direction
from kvortex.transfer.plan import N_COPIES, Int64s, Plan, in_one_chunk
from tests.fake_driver import Result
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.pages import PagedCache, Tensor, keys_of
from tests.transfer.issuing import CALLER, CALLER_EVENT, DONE, PLANS, START, Lane
from tests.transfer.profiles import H100
from tests.transfer.recorder import Call, Recorder, predecessors
from tests.transfer.test_issue import READER, WORK, digest_of

CODE, FLAG = 719, 0xF1A600


def early(raised: int = 0, turn: int = 1, **options: Any) -> Lane:
    cells: Int64s = digest_of(reads=True, apart=7)
    cells[dg.FLAG] = FLAG
    return Lane(2, False, turn, digest=cells, raised=raised, **options)


def plan_of(name: str) -> Plan:
    plan = in_one_chunk(PLANS[name])
    assert len(plan.chunks) == 1 and plan.chunks[0, N_COPIES] == len(plan.copies)
    return plan


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("name", ["direct", "one buffer"])
def test_copies_the_flag_behind_them_and_then_the_kernel(name: str, turn: int) -> None:
    plan, recorder = plan_of(name), Recorder()
    lane = early(7, turn)
    assert lane.issue(recorder, plan) == (0, 0)
    calls, before = recorder.calls, predecessors(recorder.calls)
    copying, reading = lane.streams.tolist()
    copies = [at for at, call in enumerate(calls) if call.name in WORK and call.name != "launch"]
    assert len(copies) == len(plan.copies) and {calls[at].stream for at in copies} == {copying}, "in the order of values"
    (read,) = (at for at, call in enumerate(calls) if call.name == "launch")
    raised = calls.index(Call("write_value", (copying, FLAG, 8, 0)))
    start, done = (next(at for at, c in enumerate(calls) if c.name == "record" and c.arguments[0] == e) for e in (START, DONE))
    caller = calls.index(Call("record", (CALLER_EVENT, CALLER)))
    assert set(copies) <= before[raised] and raised < read, "who waits for what is not issued yet may wait for ever"
    assert calls[read].stream == reading and calls[read].arguments[0] == READER and calls[read].parameters[9:11] == (FLAG, 8)
    assert calls[start + 1].name in WORK, "nothing is between the beginning and the first copy"
    assert all(caller in before[at] for at in (start, read, *copies)) and {read, start, *copies} <= before[done]
    assert calls[done].stream == reading
    assert {call.stream for call in calls if call.name not in ("push", "pop")} == {CALLER, copying, reading}
    waits = [call.arguments[1] for call in calls if call.name == "wait" and call.stream == reading]
    assert waits == [START] and before[min(copies)] - before[start] == {start}, "or it keeps room from what copies wait for"


def test_each_load_has_a_value_of_its_own() -> None:
    lane, recorder = early(0xFFFFFFFE), Recorder()
    for _ in range(3):
        assert lane.issue(recorder, plan_of("direct")) == (0, 0)
    values = [call.arguments[2] for call in recorder.calls if call.name == "write_value"]
    assert values == [0xFFFFFFFF, 0, 1] == [call.parameters[10] for call in recorder.calls if call.name == "launch"]
    first, *_ = (at for at, call in enumerate(recorder.calls) if call.name == "write_value")
    lane, refused = early(7), Recorder({first: CODE})
    assert [lane.issue(refused, plan_of("direct"))[0] for _ in range(2)] == [CODE, 0]
    assert [call.arguments[2] for call in refused.calls if call.name == "write_value"] == [8, 9], "refused, and of the next one"


def test_events_in_the_place_of_a_stream() -> None:
    lane, recorder = early(after=[0xA1, 0xA2]), Recorder()
    recorder.calls += [Call("record", (event, 0xFA00)) for event in (0xA1, 0xA2)]
    assert lane.issue(recorder, plan_of("direct")) == (0, 0)
    before = predecessors(recorder.calls)
    work = [at for at, call in enumerate(recorder.calls) if call.name in WORK]
    assert work and all({0, 1} <= before[at] for at in work)
    assert {call.stream for call in recorder.calls[2:] if call.name not in ("push", "pop")} == {*lane.streams.tolist()}


@pytest.mark.parametrize("name", ["direct", "one buffer"])
def test_a_driver_that_refuses_any_call(name: str) -> None:
    """No work behind a refusal; no kernel that waits for a flag which nobody raises; and ``done`` behind all work before it, or
    the code that says that it is not."""

    def issued(fails: dict[int, int]) -> tuple[tuple[int, int], Recorder]:
        recorder = Recorder(fails)
        return early().issue(recorder, plan_of(name)), recorder

    total = len(issued({})[1].calls)
    for at in range(1, total):
        (first, last), recorder = issued({at: CODE})
        calls, failed = recorder.calls, recorder.calls[at]
        assert recorder.names[-1] == "pop" and recorder.names.count("pop") == 1
        if failed.name == "pop":
            assert (first, last) == (0, 0)
            continue
        assert CODE in (first, last), "a refusal that nobody hears of"
        assert not first or not any(call.name in (*WORK, "write_value") for call in calls[at + 1 :])
        dones = [k for k, call in enumerate(calls) if call.name == "record" and call.arguments[0] == DONE]
        assert len(dones) == 1
        if not last:
            work = {k for k, call in enumerate(calls) if call.name in WORK and k != at}
            assert work <= predecessors(calls, {at: CODE})[dones[0]]
    (first, last), recorder = issued({0: CODE})
    assert first == CODE and not last and recorder.names == ["push"]


def cache_of(kind: str) -> PagedCache:
    device = CudaDevice()
    if kind == "one piece":
        return PagedCache(device, [Tensor(device, (40, H100.copy_bytes), 1)], 0)
    return PagedCache(device, [Tensor(device, (16, 40, 4, 256))], 1)


def reads_early(gpu: FakeGpu, engine: Any, count: int, **how: Any) -> bool:
    """Whether a load of so many blocks does, after a save that does not."""
    keys, source, target = keys_of(*range(count)), np.arange(count), 39 - np.arange(count)
    gpu.issued.calls.clear()
    assert engine.save_blocks(keys, source).wait().all()
    assert not [call for call in gpu.issued.calls if call.name == "write_value"]
    gpu.issued.calls.clear()
    assert engine.load_blocks(keys, target, **how).wait().all()
    raised = [call for call in gpu.issued.calls if call.name == "write_value"]
    launches = [call for call in gpu.issued.calls if call.name == "launch"]
    copies = {call.stream for call in gpu.issued.calls if call.name in ("lines", "to_device")}
    assert [call.parameters[9:11] for call in launches] == [call.arguments[1:3] for call in raised] or not raised
    assert not raised or copies == {raised[0].stream} != {launches[0].stream}
    return bool(raised)


@pytest.mark.parametrize(
    ("kind", "options", "count", "expected"),
    [
        ("even", {}, 1, True),
        ("even", {}, 5, True),
        ("even", {"num_transfer_streams": 1, "staging_buffers": 2}, 5, True),
        ("even", {"num_transfer_streams": 3}, 5, True),
        ("even", {"num_transfer_streams": 1, "staging_buffers": 1}, 1, True),
        ("even", {"beside_compute": True}, 1, False),
        ("even", {"digests": False}, 1, False),
        ("even", {"transfer_route": "batched"}, 1, False),
        ("even", {"transfer_route": "mapped"}, 1, False),
        ("one piece", {}, 1, True),
        ("one piece", {}, 30, True),
        ("one piece", {"beside_compute": True}, 1, False),
    ],
)
def test_which_loads_are_read_early(
    kind: str, options: dict[str, Any], count: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_gpu(monkeypatch) as gpu:
        cache = cache_of(kind)
        with cache.engine(slots=40, **{"transfer_route": "strided", "beside_compute": False} | options) as engine:
            before = cache.randomize()
            assert reads_early(gpu, engine, count) is expected
            moves = [(at, 39 - at) for at in range(count)]
            for found, wanted in zip(cache.memory(), cache.expected(before, before, moves), strict=True):
                np.testing.assert_array_equal(found, wanted)


def test_long_loads_and_those_of_a_gpu_without_such_flags_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added up in VRAM is sent there and read back: microseconds more are nothing to that."""
    monkeypatch.setattr(dg, "MOST_APART", 5 * 16)
    with fake_gpu(monkeypatch) as gpu:
        cache, attribute = cache_of("even"), gpu.answers["cuDeviceGetAttribute"]
        for able in (True, False):
            if not able:
                lacks = lambda name, _: (Result(0), 0) if "MEM_OPS" in str(name) else attribute(name, 0)  # noqa: E731
                gpu.answers["cuDeviceGetAttribute"] = lacks
            with cache.engine(slots=40, transfer_route="strided", beside_compute=False) as engine:
                cache.randomize()
                assert reads_early(gpu, engine, 5) is able and not reads_early(gpu, engine, 6)


def test_who_has_work_on_the_stream_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So does, as far as other loads go, who says that he does not: they would wait behind his."""
    with fake_gpu(monkeypatch) as gpu:
        cache = cache_of("even")
        for says in (None, False):
            with cache.engine(slots=40, transfer_route="strided", beside_compute=says) as engine:
                cache.randomize()
                for works in (False, True):
                    monkeypatch.setattr(type(engine._executor), "_has_work", lambda *_: works)  # noqa: B023
                    assert reads_early(gpu, engine, 1) is not works


@pytest.mark.parametrize("streams", [1, 3])
def test_two_streams_and_half_of_the_multiprocessors_are_taken(streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8, as much as there is to read: 16 pieces a block."""
    with fake_gpu(monkeypatch) as gpu:
        cache = cache_of("even")
        options = {"num_transfer_streams": streams, "staging_buffers": 3, "transfer_route": "strided"}
        with cache.engine(slots=40, **options) as engine:
            cache.randomize()
            lane = engine._executor._lanes[Direction.LOAD]
            jobs: list[Any] = []
            monkeypatch.setattr(lane, "issue", lambda job, issue=lane.issue: (jobs.append(job), issue(job))[1])
            for count, shape in ((1, (4, 128)), (2, (4, 256)), (4, (4, 512)), (30, (4, 512))):
                assert reads_early(gpu, engine, count)
                (launch,) = (call for call in gpu.issued.calls if call.name == "launch")
                assert (launch.arguments[1], launch.arguments[4]) == shape
                assert launch.stream not in lane.ordinary_streams and launch.stream in lane.every_stream
            assert [len(given[6]) for _, given in jobs] == [2] * 4, "what is issued on must be told"


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("busy", [None, "says so", "has work"])
@pytest.mark.parametrize(("sizes", "fits"), [([1 << 20], True), ([(1 << 20) + 1], False), ([5000, 1, 4096, 70000], True)])
def test_short_buffers_are_read_early_too(
    sizes: list[int], fits: bool, busy: str | None, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dg, "MOST_APART", 256)
    with fake_gpu(monkeypatch) as gpu:
        device, most = CudaDevice(), max(sizes)
        options = {"device": "cuda", "cpu_pool_size_bytes": 8 * most, "max_block_bytes": most, "num_transfer_streams": streams}
        options["beside_compute"] = True if busy == "says so" else None
        with kvortex.KVortexEngine.create(kvortex.KVortexConfig(**options)) as engine:
            data = [np.random.default_rng(at).integers(0, 256, size, np.uint8) for at, size in enumerate(sizes)]
            keys, pairs = keys_of(*range(len(sizes))), [(device.allocate(size), device.allocate(size)) for size in sizes]
            for (source, _), own in zip(pairs, data, strict=True):
                source.write(own)
            assert engine.save_blocks(keys, data_ptrs=[source.address for source, _ in pairs], sizes=sizes).wait().all()
            assert not [call for call in gpu.issued.calls if call.name == "write_value"]
            if busy == "has work":
                monkeypatch.setattr(type(engine._executor), "_has_work", lambda *_: True)
            assert engine.load_blocks(keys, output_ptrs=[target.address for _, target in pairs], sizes=sizes).wait().all()
            early = bool([call for call in gpu.issued.calls if call.name == "write_value"])
            assert early is (fits and busy is None)
            assert all((target.read() == own).all() for (_, target), own in zip(pairs, data, strict=True))


def test_many_copies_and_loads_beside_others_are_not_read_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such copies are faster on several streams; and behind what is being loaded a kernel would keep its room for long."""
    with fake_gpu(monkeypatch) as gpu:
        cache = cache_of("even")
        with cache.engine(slots=40, transfer_route="strided") as engine:
            cache.randomize()
            monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", 8)
            assert reads_early(gpu, engine, 5) and not reads_early(gpu, engine, 6)
            lane = engine._executor._lanes[Direction.LOAD]
            for stream in lane.every_stream.tolist():
                with monkeypatch.context() as patch:
                    patch.setitem(gpu.answers, "cuStreamQuery", lambda asked: (Result(600 if asked == stream else 0),))  # noqa: B023
                    assert reads_early(gpu, engine, 5) is (stream not in lane.ordinary_streams.tolist())
