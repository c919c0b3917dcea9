"""A device that fails: told on the ticket, never wrong bytes, never a slot or pin that stays taken."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading

import numpy as np
import pytest

from kvortex.devices import Device, HostDevice
from kvortex.errors import BuildError, DeviceError, PinnedMemoryError, TransferError
from tests.pages import PagedCache, keys_of


def refuse(*_: object, **__: object) -> None:
    raise DeviceError("planted")


@pytest.fixture
def broken_host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Copies of the host device raise."""
    monkeypatch.setattr("kvortex.transfer.host.copy_paged", refuse)
    return monkeypatch


def test_a_failed_save_is_never_visible(broken_host: pytest.MonkeyPatch) -> None:
    cache = PagedCache.plain(HostDevice())
    with cache.engine() as engine:
        ticket = engine.save_blocks(keys_of(1, 2), [1, 2])
        assert not ticket.wait().any()
        assert isinstance(ticket.error, TransferError) and "planted" in str(ticket.error)
        stats = engine.get_stats()
        assert (stats.failed_blocks, stats.resident_blocks, stats.reserved_blocks) == (2, 0, 0)
        assert not engine.check_blocks(keys_of(1, 2)).any()
        broken_host.undo()
        assert engine.save_blocks(keys_of(1, 2), [1, 2]).wait().all()


def test_a_failed_load_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache.plain(HostDevice())
    with cache.engine() as engine:
        engine.save_blocks(keys_of(1), [1]).wait()
        monkeypatch.setattr("kvortex.transfer.host.copy_paged", refuse)
        ticket = engine.load_blocks(keys_of(1, 2), [5, 6])
        assert ticket.wait().tolist() == [False, False]
        assert "planted" in str(ticket.error)
        assert engine.get_stats().pinned_blocks == 0
        monkeypatch.undo()
        assert engine.load_blocks(keys_of(1), [5]).wait().all()


def test_a_save_that_waited_for_a_failed_one_fails_too(broken_host: pytest.MonkeyPatch) -> None:
    from kvortex.devices import HostStream

    cache = PagedCache.plain(HostDevice())
    stream = HostStream()
    held = threading.Event()
    stream.enqueue(lambda: void(held.wait()))
    with cache.engine() as engine:
        first = engine.save_blocks(keys_of(1), [1], stream=stream)
        second = engine.save_blocks(keys_of(1), [2])
        assert not second.done()
        held.set()
        assert not first.wait().any() and not second.wait().any()
    stream.close()


def void(_: object) -> None:
    pass


def test_a_transfer_that_cannot_be_issued(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache.plain(device)
    with cache.engine() as engine:
        engine.save_blocks(keys_of(1), [1]).wait()
        monkeypatch.setattr(engine._executor, "prepare_blocks", refuse)
        for ticket in (engine.save_blocks(keys_of(2), [2]), engine.load_blocks(keys_of(1), [3])):
            assert ticket.done() and not ticket.mask.any() and "planted" in str(ticket.error)
        monkeypatch.undo()
        stats = engine.get_stats()
        assert (stats.failed_blocks, stats.resident_blocks, stats.reserved_blocks, stats.pinned_blocks) == (2, 1, 0, 0)


def test_an_interrupt_while_issuing_gives_the_slots_back(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache.plain(device)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with cache.engine() as engine:
        engine.save_blocks(keys_of(1), [1]).wait()
        monkeypatch.setattr(engine._executor, "prepare_blocks", interrupt)
        for call in (lambda: engine.save_blocks(keys_of(2), [2]), lambda: engine.load_blocks(keys_of(1), [3])):
            with pytest.raises(KeyboardInterrupt):
                call()
        monkeypatch.undo()
        stats = engine.get_stats()
        assert (stats.reserved_blocks, stats.pinned_blocks) == (0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("route", "broken"),
    [
        *itertools.product(["staged", "resident"], ["LAUNCH", "COPY_TO_DEVICE", "EVENT_RECORD"]),
        ("batched", "COPY_BATCH"),
        ("batched", "EVENT_RECORD"),
    ],
)
def test_driver_calls_that_fail_while_issuing(broken: str, route: str) -> None:
    """The compiled code calls functions by address: put the address of one that fails."""
    from kvortex.devices import driver as cu
    from kvortex.devices import open_device

    cache = PagedCache.plain(open_device("cuda"))
    with cache.engine(transfer_route=route) as engine:
        before = cache.randomize()
        engine.save_blocks(keys_of(1), [1]).wait()
        executor = engine._executor
        good = executor._functions  # type: ignore[attr-defined]
        bad = good.copy()
        fail = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)  # CUDA_ERROR_INVALID_VALUE, whatever the arguments
        which = [cu.COPY_BATCH, cu.COPY_BATCH_12] if broken == "COPY_BATCH" else getattr(cu, broken)
        bad[which] = ctypes.cast(fail, ctypes.c_void_p).value
        executor._functions = bad  # type: ignore[attr-defined]
        ticket = engine.load_blocks(keys_of(1), [5])
        assert not ticket.wait().any() and isinstance(ticket.error, TransferError)
        executor._functions = good  # type: ignore[attr-defined]
        assert engine.get_stats().pinned_blocks == 0
        assert engine.load_blocks(keys_of(1), [6]).wait().all()
        view = cache.tensors[0].view(cache.memory()[0])
        np.testing.assert_array_equal(view[:, 6], cache.tensors[0].view(before[0])[:, 1])


def test_memory_that_cannot_be_pinned(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache.plain(device)
    monkeypatch.setattr(type(device), "pin", refuse)
    monkeypatch.setattr(type(device), "allocate_pinned", refuse)
    with pytest.raises(PinnedMemoryError, match="planted.*cpu_pool_size_bytes.*ulimit"):
        cache.engine()


def test_registration_refused_allocation_works(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache.plain(device)
    monkeypatch.setattr(type(device), "pin", refuse)
    with cache.engine() as engine:
        assert engine._parts.arena.pinned_by == "alloc"
        before = cache.randomize()
        engine.save_blocks(keys_of(1), [1]).wait()
        cache.randomize()
        engine.load_blocks(keys_of(1), [1]).wait()
        view, old = cache.tensors[1].view(cache.memory()[1]), cache.tensors[1].view(before[1])
        np.testing.assert_array_equal(view[:, 1], old[:, 1])


def test_what_the_platform_lacks_is_told_by_the_engine(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache.plain(device)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    with cache.engine(cpu_pool_size_bytes=4 << 20) as engine:
        assert "no huge pages on this platform" in engine.notes
    monkeypatch.setattr(type(device), "pin", refuse)
    engine = cache.engine()
    assert engine.notes[-1] == "registration refused: planted"
    engine.shutdown()
    assert isinstance(engine.notes, tuple) and engine.notes[-1] == "registration refused: planted"


def test_more_host_memory_than_there_is() -> None:
    cache = PagedCache.plain(HostDevice())
    with pytest.raises(PinnedMemoryError, match="lower cpu_pool_size_bytes"):
        cache.engine(cpu_pool_size_bytes=1 << 50)


@pytest.mark.gpu
def test_a_kernel_that_does_not_build(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvortex.devices import open_device

    def fail(*_: object) -> None:
        raise BuildError("planted")

    cache = PagedCache.plain(open_device("cuda"))
    monkeypatch.setattr("kvortex.kernels.build.load", fail)
    with pytest.raises(BuildError, match="planted"):
        cache.engine()
