"""The pinned pool: as many slots as the budget holds, every byte pinned once and unpinned once, on every path."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from kvortex.errors import ConfigError, PinnedMemoryError
from kvortex.memory import arena as module
from kvortex.memory import filling
from kvortex.memory.arena import SLOT_ALIGNMENT, PinnedArena
from kvortex.transfer.executor import poll
from tests.memory.recording import RecordingDevice


def covered(device: RecordingDevice, arena: PinnedArena) -> list[tuple[int, int]]:
    """(first, last) slot byte of each registration, in order, after checking that they cover the pool exactly once."""
    assert arena.wait(arena.slots, 20) and arena.ready == arena.slots and not arena.growing
    spans = sorted((address - arena.address, address - arena.address + nbytes) for address, nbytes in device.pinned.items())
    assert spans[0][0] == 0 and spans[-1][1] == arena.slots * arena.slot_bytes
    assert all(end == start for (_, end), (start, _) in zip(spans[:-1], spans[1:], strict=True))
    return spans


@pytest.mark.parametrize(
    ("budget", "record", "slot", "slots"),
    [
        (4096, 1, 4096, 1),
        (4096, 4096, 4096, 1),
        (8191, 4096, 4096, 1),
        (8192, 4096, 4096, 2),
        (8192, 4097, 8192, 1),
        (8193, 4097, 8192, 1),
        (16383, 4097, 8192, 1),
        (16384, 8192, 8192, 2),
        (1 << 20, 5000, 8192, 128),
        ((1 << 20) - 1, 5000, 8192, 127),
        (3 * 4096 * 7 + 1, 12288, 12288, 7),
    ],
)
def test_slots_are_exactly_what_the_budget_holds(budget: int, record: int, slot: int, slots: int) -> None:
    device = RecordingDevice()
    arena = PinnedArena(device, budget, record)
    assert (arena.slot_bytes, arena.slots, arena.nbytes) == (slot, slots, slot * slots) and arena.nbytes <= budget
    assert arena.address % SLOT_ALIGNMENT == 0 and arena.slot_bytes % SLOT_ALIGNMENT == 0
    assert covered(device, arena) == [(0, arena.nbytes)] and arena.pinned_by == "register"
    arena.close()
    assert not device.pinned


@pytest.mark.parametrize(("budget", "record"), [(1, 1), (4095, 1), (4096, 4097), (8191, 4097)])
def test_a_budget_below_one_slot(budget: int, record: int) -> None:
    device = RecordingDevice()
    slot = -(-record // 4096) * 4096
    with pytest.raises(ConfigError, match=f"cpu_pool_size_bytes = {budget}: does not hold one block, which takes {slot} bytes"):
        PinnedArena(device, budget, record)
    assert not device.log


@pytest.mark.parametrize(
    ("segment", "spans"),
    [
        (4096 * 2, [(0, 2), (2, 4), (4, 6), (6, 7)]),
        (4096 * 3 + 4095, [(0, 3), (3, 6), (6, 7)]),
        (4096 * 7, [(0, 7)]),
        (4096 * 100, [(0, 7)]),
        (4096, [(at, at + 1) for at in range(7)]),
        (1, [(at, at + 1) for at in range(7)]),  # a slot larger than a segment is a segment of its own
    ],
)
def test_segments_cover_everything_once(monkeypatch: pytest.MonkeyPatch, segment: int, spans: list[tuple[int, int]]) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", segment)
    device = RecordingDevice()
    arena = PinnedArena(device, 7 * 4096, 4000)
    assert covered(device, arena) == [(first * 4096, last * 4096) for first, last in spans]
    assert arena.segment_slots == (spans[0][1] if len(spans) > 1 else max(1, segment // 4096))
    for slot in range(arena.slots):  # what the planner assumes: slots of one segment number are in one registration
        holder = [n for n, (first, last) in enumerate(spans) if first <= slot < last]
        assert holder == [slot // arena.segment_slots]
    arena.close()
    arena.close()
    pins = [address for word, address in device.log if word == "pin"]
    unpins = [address for word, address in device.log if word == "unpin"]
    assert sorted(pins) == sorted(unpins) and len(set(unpins)) == len(unpins) == len(spans)


def test_a_refused_registration_is_undone_and_memory_is_allocated_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 2 * 4096)
    device = RecordingDevice(pins_before_refusal=0)
    arena = PinnedArena(device, 7 * 4096, 4096)
    assert not device.pinned and [word for word, _ in device.log] == ["allocate"]
    assert arena.pinned_by == "alloc" and arena.notes[-1] == "registration refused: registration is forbidden here"
    assert arena._mapping is None and device.log[-1] == ("allocate", arena.address)
    assert arena.segment_slots == arena.slots == arena.ready == 7 and not arena.growing, "one allocation has no inner borders"
    assert all(not arena.view(slot).any() for slot in range(7)), "zeroed, as the mapping is"
    arena.close()
    arena.close()
    assert [word for word, _ in device.log].count("free") == 1 and not device._pinned


@pytest.mark.parametrize("refused_at", [1, 3])
def test_what_is_refused_later_makes_the_pool_smaller(monkeypatch: pytest.MonkeyPatch, refused_at: int) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 2 * 4096)
    device = RecordingDevice(pins_before_refusal=refused_at)
    arena = PinnedArena(device, 7 * 4096, 4096)
    assert arena.wait(arena.slots, 20), "there is nothing to wait for any more"
    assert arena.ready == 2 * refused_at and not arena.growing and arena.pinned_by == "register"
    assert arena.notes[-1] == f"the pool has {2 * refused_at} of 7 slots: registration is forbidden here"
    assert len(device.pinned) == refused_at and not arena.view(2 * refused_at - 1).any()
    arena.close()
    assert not device.pinned


class Gated(RecordingDevice):
    """Registers the first segment, and others when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may, self.asked = threading.Event(), threading.Event()

    def pin(self, address: int, nbytes: int) -> None:
        if self.pinned:
            self.asked.set()
            assert self.may.wait(20)
        super().pin(address, nbytes)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Gated, PinnedArena]]:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 2 * 4096)
    device = Gated()
    arena = PinnedArena(device, 7 * 4096, 4096)
    yield device, arena
    device.may.set()
    arena.close()
    assert not device.pinned


def test_the_first_segment_can_be_used_before_the_others(gated: tuple[Gated, PinnedArena]) -> None:
    device, arena = gated
    assert arena.ready == 2 and arena.growing and arena.slots == 7
    arena.view(1)[:] = 5
    assert arena.wait(2, 0) and not arena.wait(3, 0.02), "the deadline"
    device.may.set()
    assert arena.wait(7, 20) and arena.ready == 7 and not arena.growing
    assert (arena.view(1) == 5).all() and not arena.view(6).any() and len(device.pinned) == 4


def test_closing_in_the_middle(gated: tuple[Gated, PinnedArena]) -> None:
    """The segment that the driver is registering is waited for, unregistered like the others, and no further one begins."""
    device, arena = gated
    assert device.asked.wait(20)
    closer = threading.Thread(target=arena.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive() and arena._mapping is not None
    device.may.set()
    closer.join(20)
    assert not device.pinned and arena._mapping is None
    assert [word for word, _ in device.log] == ["pin"] * 2 + ["unpin"] * 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_that_stop_leave_a_smaller_pool_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 2 * 4096)
    monkeypatch.setattr("kvortex.memory.filling.TOUCH_BYTES", 4096)
    device, memset = RecordingDevice(), ctypes.memset
    bad = [5]

    def fails(address: int, byte: int, nbytes: int) -> int:
        if address % (2 << 20) == bad[0] * 4096:
            if bad[0]:
                assert poll(lambda: len(device.pinned) == bad[0] // 2, time.monotonic() + 20)
            raise MemoryError("planted")
        return memset(address, byte, nbytes)

    monkeypatch.setattr("kvortex.memory.filling.ctypes.memset", fails)
    arena = PinnedArena(device, 7 * 4096, 4096)
    assert arena.wait(7, 20) and arena.ready == 4 and not arena.growing
    assert arena.notes[-1] == "the pool has 4 of 7 slots: the threads that make the pool resident have stopped"
    arena.close()
    bad[0] = 0
    with pytest.raises(PinnedMemoryError, match="have stopped"):
        PinnedArena(device, 7 * 4096, 4096)
    assert not device.pinned


def test_closing_from_the_thread_that_builds(gated: tuple[Gated, PinnedArena], monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may free an engine in any thread."""
    device, arena = gated
    pin = RecordingDevice.pin

    def collected(self: RecordingDevice, address: int, nbytes: int) -> None:
        arena.close()
        pin(self, address, nbytes)

    monkeypatch.setattr(RecordingDevice, "pin", collected)
    device.may.set()
    assert poll(lambda: arena._mapping is None, time.monotonic() + 20)
    assert not device.pinned


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_closing_from_a_thread_that_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot wait for itself; the memory goes all the same, when it has ended."""
    monkeypatch.setattr(module, "SEGMENT_BYTES", 4096)
    monkeypatch.setattr(filling, "TOUCH_BYTES", 4096)
    memset, made = ctypes.memset, threading.Event()
    arenas: list[PinnedArena] = []

    def closes(address: int, byte: int, nbytes: int) -> int:
        if threading.current_thread().name == "kvortex-fill" and address % (1 << 21) == 5 * 4096:
            assert made.wait(20)
            arenas[0].close()
        return memset(address, byte, nbytes)

    monkeypatch.setattr(filling.ctypes, "memset", closes)
    device = RecordingDevice()
    arenas.append(PinnedArena(device, 8 * 4096, 4096))
    made.set()
    assert poll(lambda: arenas[0]._mapping is None, time.monotonic() + 20) and not device.pinned


def test_a_wait_without_an_end(gated: tuple[Gated, PinnedArena]) -> None:
    device, arena = gated
    waiter = threading.Thread(target=lambda: ended.append(arena.wait(arena.slots, float("inf"))))
    ended: list[bool] = []
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive(), "and no error"
    device.may.set()
    waiter.join(20)
    assert ended == [True]


def test_an_interrupt_while_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 2 * 4096)

    class Interrupted(RecordingDevice):
        def pin(self, address: int, nbytes: int) -> None:
            super().pin(address, nbytes)
            raise KeyboardInterrupt

    device, before = Interrupted(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        PinnedArena(device, 7 * 4096, 4096)
    assert not device.pinned and threading.active_count() == before


def test_neither_way_of_pinning() -> None:
    device = RecordingDevice(pins_before_refusal=0, allocations_before_refusal=0)
    with pytest.raises(PinnedMemoryError) as caught:
        PinnedArena(device, 2 * 4096, 4096)
    for part in ("8192 bytes", "registration is forbidden here", "no memory left", "cpu_pool_size_bytes", "ulimit -l"):
        assert part in str(caught.value)
    assert not device.pinned and not device._pinned


def test_views_are_the_slots_themselves() -> None:
    device = RecordingDevice()
    arena = PinnedArena(device, 4 * 8192, 5000)
    for slot in range(4):
        arena.view(slot)[:] = slot + 1
    for slot in range(4):
        assert (arena.view(slot) == slot + 1).all() and len(arena.view(slot)) == 8192
        assert len(arena.view(slot, 5000)) == 5000 and arena.view(slot).ctypes.data == arena.address + slot * 8192
    arena.view(2, 100)[:] = 9
    assert arena.view(2).sum() == 100 * 9 + (8192 - 100) * 3 and (arena.view(3) == 4).all()
    arena.close()


@pytest.mark.parametrize("pins", [None, 0])
def test_close_goes_on_where_the_driver_refuses(monkeypatch: pytest.MonkeyPatch, pins: int | None) -> None:
    """After a GPU fault every call fails; the host memory must be given back all the same."""
    monkeypatch.setattr(module, "SEGMENT_BYTES", 4096)
    device = RecordingDevice(pins_before_refusal=pins)
    arena = PinnedArena(device, 3 * 4096, 4096)
    assert arena.wait(3, 20)
    device.refuses_to_undo = True
    arena.close()
    assert not device.pinned and not device._pinned and arena._mapping is None and not arena._registered


@pytest.mark.parametrize(
    ("numa", "nodes", "node", "wanted"), [(True, 2, 1, 1), (True, 1, 1, None), (False, 2, 1, None), (True, 2, None, None)]
)
def test_the_node_of_the_device(
    monkeypatch: pytest.MonkeyPatch, numa: bool, nodes: int, node: int | None, wanted: int | None
) -> None:
    asked: list[int | None] = []
    make = module.Mapping
    monkeypatch.setattr(module.numa_nodes, "node_count", lambda: nodes)
    monkeypatch.setattr(module.numa_nodes, "misplaced", lambda *_: None)
    monkeypatch.setattr(module, "Mapping", lambda nbytes, node: asked.append(node) or make(nbytes))
    device = RecordingDevice()
    device.node = node
    PinnedArena(device, 4096, 4096, numa=numa).close()
    assert asked == [wanted]


@pytest.mark.gpu
def test_a_gpu_reads_and_writes_every_slot() -> None:
    from kvortex.devices import driver as cu
    from kvortex.devices.cuda import CudaDevice

    device = CudaDevice()
    arena = PinnedArena(device, 5 * 4096, 4096)
    assert device.owner_of(arena.address) == "host"
    data = np.random.default_rng(0).integers(0, 256, arena.nbytes, np.uint8)
    buffer = device.allocate(arena.nbytes)
    buffer.write(data)
    with cu.current(device.context) as driver:
        cu.check(driver.cuMemcpyDtoH(arena.address, buffer.address, arena.nbytes), "cuMemcpyDtoH")
    assert all((arena.view(slot) == data[slot * 4096 : (slot + 1) * 4096]).all() for slot in range(5))
    address = arena.address
    arena.close()
    assert device.owner_of(address) is None


def test_pages_on_another_node_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.numa_nodes, "node_count", lambda: 2)
    monkeypatch.setattr(module.numa_nodes, "bind", lambda *_: None)
    seen: list[int] = []
    monkeypatch.setattr(module.numa_nodes, "nodes_of", lambda at: seen.extend(at) or [0] * 3 + [1] * (len(at) - 3))
    device = RecordingDevice()
    device.node = 1
    arena = PinnedArena(device, 64 * 4096, 4096)
    assert arena.notes == ["3 of 64 pages looked at are not on NUMA node 1"]
    assert seen == [arena.address + at * 4096 for at in range(64)]
    arena.close()
