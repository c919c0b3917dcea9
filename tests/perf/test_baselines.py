"""The other ways to move blocks move every byte, see a wrong one, and say when they cannot run."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import kvortex
from kvortex.devices import Device, HostDevice
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError
from kvortex.memory.arena import PinnedArena
from perf import baselines, duplex, fragments, latency
from perf.baselines import ALL, Baseline, Batched, CupyGather, PerFragment, TorchGather, open_baselines
from perf.clock import CudaClock
from perf.pages import Pages
from perf.raw import RawCopy
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.perf import fake_libraries
from tests.transfer.recorder import Call

_WORD = ctypes.c_longlong


def batches_of(gpu: FakeGpu, name: str = "batch") -> list[Call]:
    return [call for call in gpu.issued.calls if call.name == name]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A GPU made of RAM, and both libraries."""
    monkeypatch.setitem(sys.modules, "torch", fake_libraries.torch())
    monkeypatch.setitem(sys.modules, "cupy", fake_libraries.cupy())
    with fake_gpu(monkeypatch) as made:
        yield made


def pages_on(device: Device) -> Pages:
    return Pages(device, 8 << 10, 3 << 20)


@pytest.fixture
def pages(gpu: FakeGpu) -> Iterator[Pages]:
    made = pages_on(kvortex.open_device("cuda"))
    yield made
    made.close()


@pytest.fixture(params=ALL, ids=[kind.name for kind in ALL])
def baseline(request: pytest.FixtureRequest, pages: Pages) -> Iterator[Baseline]:
    made = request.param(pages)
    yield made
    made.close()


def test_every_byte_arrives(baseline: Baseline) -> None:
    assert baseline.nbytes == baseline.pages.count * 64 * (8 << 10)
    assert baseline.check() == 0


@pytest.mark.parametrize("way", ["save", "load"])
def test_a_wrong_byte_is_counted(baseline: Baseline, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    move = getattr(baseline, way)

    def spoil(blocks: np.ndarray) -> float:
        seconds = move(blocks)
        if way == "save":
            baseline.records()[63, -1, -1] ^= 1
        else:
            memory = baseline.pages.memory
            fake_libraries.ram(memory.address, memory.nbytes)[12345] ^= 1
        return seconds

    monkeypatch.setattr(baseline, way, spoil)
    assert baseline.check() == 1


@pytest.mark.parametrize("way", ["save", "load"])
def test_a_move_that_does_nothing_is_seen(baseline: Baseline, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, way, lambda blocks: 1e-3)
    assert baseline.check() > baseline.nbytes // 2


def test_a_load_from_what_the_save_left_in_vram_is_seen(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer still has the right bytes of a round trip, so a copy that was forgotten would not show in one."""
    made = TorchGather(pages)
    monkeypatch.setattr(made._buffer, "copy_", lambda *_, **__: None)
    assert made.check() > made.nbytes // 2
    made.close()


@pytest.mark.parametrize("kind", [PerFragment, Batched])
def test_records_are_page_first(kind: type[Baseline], pages: Pages) -> None:
    made, before = kind(pages), pages.fill()
    source, _ = pages.halves()
    made.save(source)
    old = pages.view(before)
    for n, block in enumerate(source.tolist()):
        size = pages.layout.record_bytes
        assert (made.host.view(0, made.nbytes)[n * size : (n + 1) * size] == old[:, block].reshape(-1)).all()
    made.close()


def test_one_call_of_the_driver_a_fragment(gpu: FakeGpu, pages: Pages) -> None:
    made = PerFragment(pages)
    source, target = pages.halves()
    made.save(source)
    made.load(target)
    n, stream = 64 * pages.count, made.clock.stream
    names = ["push", "record", *["to_host"] * n, "record", "pop", "push", "record", *["to_device"] * n, "record", "pop"]
    assert gpu.issued.names == names and stream
    assert {call.stream for call in gpu.issued.calls if call.name not in ("push", "pop")} == {stream}
    made.close()


def test_one_call_for_the_whole_batch(gpu: FakeGpu, pages: Pages) -> None:
    made = Batched(pages)
    source, target = pages.halves()
    made.save(source)
    made.load(target)
    calls = batches_of(gpu)
    assert [call.parameters[-7:-1] for call in calls] == [(1, 0, 0, 0, 0, 0), (3, 0, 0, 0, 0, 0)], "the orders of reads"
    assert all(call.arguments[3] == 64 * pages.count and call.stream == made.clock.stream != 0 for call in calls)
    assert gpu.issued.names == ["push", "record", "batch", "record", "pop"] * 2
    made.close()


def test_the_batched_copy_of_cuda_12_8(gpu: FakeGpu, pages: Pages) -> None:
    gpu.answers["cuDriverGetVersion"] = 12090
    cu.functions.cache_clear()
    made = Batched(pages)
    assert made.check() == 0
    calls = batches_of(gpu, "batch_12")
    assert len(calls) == 2 and all(call.arguments[7] and call.stream == made.clock.stream for call in calls)
    made.close()


@pytest.mark.parametrize("kind", [PerFragment, Batched])
def test_an_error_of_the_driver_is_told(kind: type[Baseline], gpu: FakeGpu, pages: Pages) -> None:
    made, source = kind(pages), pages.halves()[0]
    gpu.issued.fails = {2 if kind is Batched else 5: 700}  # the batch, or the fourth copy
    with pytest.raises(DeviceError, match=rf"^{kind.name}: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
        made.save(source)
    assert gpu.issued.names[-2:] == ["record", "pop"]
    made.close()


def test_everything_is_freed(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    arenas: list[PinnedArena] = []
    opened = PinnedArena.__init__

    def remember(arena: PinnedArena, *arguments: Any, **options: Any) -> None:
        arenas.append(arena)
        opened(arena, *arguments, **options)

    monkeypatch.setattr(PinnedArena, "__init__", remember)
    made = pages_on(kvortex.open_device("cuda"))
    for found in open_baselines(made, {}):
        found.close()
    made.close()
    assert len(arenas) == 1 + len(ALL) and all(arena._mapping is None for arena in arenas)
    assert not gpu.registered and not gpu.memory
    for what in ("Event", "Stream"):
        created = sum(name.startswith(f"cu{what}Create") for name, _ in gpu.calls)
        assert created and created == len(gpu.named(f"cu{what}Destroy"))


def test_what_is_missing_is_named(gpu: FakeGpu, pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.answers["cuDriverGetVersion"] = 12060
    cu.functions.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(sys.modules["torch"].cuda, "is_available", lambda: False)
    notes: dict[str, str] = {}
    [found] = open_baselines(pages, notes)
    assert found.name == "per fragment" and notes[found.name] == PerFragment.how
    assert notes["one batch"] == "not compared: cuMemcpyBatchAsync came with CUDA 12.8, and this driver of CUDA 12.6 has none"
    assert notes["cupy"].startswith("not compared: cupy cannot be imported: ")
    assert notes["torch"] == "not compared: torch sees no GPU"
    found.close()


def test_a_driver_that_lacks_the_batched_copy(gpu: FakeGpu, pages: Pages) -> None:
    notes: dict[str, str] = {}
    find = gpu.answers["cuGetProcAddress"]
    gpu.answers["cuGetProcAddress"] = lambda name, *rest: (0, None, 1) if b"Batch" in name else find(name, *rest)
    cu.functions.cache_clear()
    assert baselines.open_baseline(Batched, pages, notes) is None
    wanted = "not compared: cuMemcpyBatchAsync came with CUDA 12.8, and this driver of CUDA 13.0 has none"
    assert notes == {"one batch": wanted}


def test_the_host_device_has_one_of_them() -> None:
    made = pages_on(HostDevice())
    notes: dict[str, str] = {}
    [found] = open_baselines(made, notes)
    assert found.name == "per fragment" and found.check() == 0
    assert [notes[kind.name] for kind in (Batched, CupyGather, TorchGather)] == ["not compared: needs a GPU"] * 3
    found.close()
    made.close()


def test_one_that_fails_closes_the_others(pages: Pages, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError("no more")

    before = dict(gpu.registered)
    monkeypatch.setattr(sys.modules["torch"], "empty", broken)
    with pytest.raises(MemoryError):
        open_baselines(pages, {})
    assert gpu.registered == before


METHODS = ["raw", "kvortex", *(kind.name for kind in ALL)]


def test_all_are_compared_on_a_gpu(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "FRAGMENT_BYTES", (64 << 10,))
    _, rows, notes = fragments.measure("cuda", quick=True)
    assert [row["method"] for row in rows] == METHODS == list(notes["methods"])
    assert all(row["wrong_bytes"] == 0 for row in rows)


def test_all_are_compared_both_ways_at_once(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplex, "FRAGMENT_BYTES", (32 << 10,))
    _, rows, notes = duplex.measure("cuda", quick=True)
    assert list(dict.fromkeys(row["method"] for row in rows)) == METHODS == list(notes["methods"])
    assert [row["direction"] for row in rows] == ["save", "load", "both"] * len(METHODS)
    assert all(row["wrong_bytes"] == 0 and row["rate"] > 0 for row in rows)


def test_all_are_compared_for_one_block(gpu: FakeGpu) -> None:
    _, rows, _ = latency.measure("cuda", quick=True)
    routes = list(dict.fromkeys(row["route"] for row in rows))
    assert routes == ["auto", "mapped", "strided", "batched", "staged", "resident", *METHODS[2:]]
    assert all(row["wrong_bytes"] == 0 for row in rows)


def test_a_raw_copy_on_a_gpu(gpu: FakeGpu) -> None:
    raw = RawCopy(kvortex.open_device("cuda"), 70_000)
    assert raw.wrong_bytes() == raw.wrong_bytes(4096) == 0
    assert raw.seconds(to_host=True) == pytest.approx(0.5e-3)
    running = [raw.start(to_host=True) for _ in range(2)]
    gpu.event_code = 600
    assert [ended() for ended in running] == [False, False]
    gpu.event_code = 0
    assert [ended() for ended in running] == [True, True]
    gpu.event_code = 700
    with pytest.raises(DeviceError, match="^cuEventQuery: CUDA_ERROR_ILLEGAL_ADDRESS"):
        running[0]()
    raw.close()
    assert len(gpu.named("cuStreamCreate")) == len(gpu.named("cuStreamDestroy")) == 2


def test_a_clock_leaves_a_foreign_stream_alone(gpu: FakeGpu) -> None:
    device = kvortex.open_device("cuda")
    assert isinstance(device, CudaDevice)
    clock = CudaClock(device, fake_libraries.Stream())
    work: list[int] = []
    assert clock.stream == 0x777 and clock.seconds(lambda: work.append(1)) == pytest.approx(0.5e-3) and work
    assert [arguments[1] for arguments in gpu.named("cuEventRecord")] == [0x777, 0x777]
    clock.close()
    assert not gpu.named("cuStreamDestroy")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ALL, ids=[kind.name for kind in ALL])
def test_every_byte_arrives_on_a_real_gpu(kind: type[Baseline]) -> None:
    made, notes = pages_on(kvortex.open_device("cuda")), {}
    try:
        found = baselines.open_baseline(kind, made, notes)
        if found is None:
            pytest.skip(f"{kind.name}: {notes[kind.name]}")
        assert found.check() == 0
        found.close()
    finally:
        made.close()
