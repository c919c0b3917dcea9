"""Mapped memory: aligned, zeroed, not shared with forked children, and gone after close."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
import pytest

from kvortex.errors import PinnedMemoryError
from kvortex.memory import mapping as module
from kvortex.memory.mapping import HUGE_PAGE, Mapping
from tests.memory.smaps import PAGE, flags_at, is_mapped, resident_pages

SIZES = [1, PAGE - 1, PAGE, PAGE + 1, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5]
real = mmap.mmap


def view(mapping: Mapping) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * mapping.nbytes).from_address(mapping.address))


@pytest.mark.parametrize("nbytes", SIZES)
def test_aligned_zeroed_and_writable_to_the_last_byte(nbytes: int) -> None:
    mapping = Mapping(nbytes)
    try:
        assert mapping.address % HUGE_PAGE == 0 and mapping.nbytes == nbytes
        assert resident_pages(mapping.address, nbytes) == 0, "that is for others to do, a part at a time"
        memory = view(mapping)
        assert not memory.any()
        memory[:] = 255
        assert memory.all()
    finally:
        mapping.close()


def test_huge_pages_are_asked_for_and_forks_do_not_copy() -> None:
    mapping = Mapping(2 * HUGE_PAGE)
    try:
        flags = flags_at(mapping.address)
        if flags is None:
            pytest.skip("this kernel shows no VmFlags")
        assert "wf" in flags and flags == flags_at(mapping.address + mapping.nbytes - 1)
        assert "hg" in flags or any("huge pages" in note for note in mapping.notes)
    finally:
        mapping.close()


def test_a_forked_child_has_zeros_in_its_place() -> None:
    """A hole would be filled by memory of the child's own, which it would lose with its copy of the mapping."""
    mapping = Mapping(PAGE)
    view(mapping)[0] = 1
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"zeros" if is_mapped(mapping.address) and not view(mapping).any() else b"other")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"zeros"
    os.waitpid(child, 0)
    assert view(mapping)[0] == 1
    mapping.close()


def test_what_the_platform_lacks_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    monkeypatch.setattr(module, "_MADV_WIPEONFORK", 9999)
    mapping = Mapping(HUGE_PAGE)
    assert mapping.notes == ["no huge pages on this platform", "no MADV_WIPEONFORK: Invalid argument"]
    assert not view(mapping).any()
    mapping.close()


def test_a_node_that_cannot_be_had_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(module.numa, "bind", lambda *arguments: asked.append(arguments) or "the node is on fire")
    mapping = Mapping(PAGE, 3)
    assert asked == [(mapping.address, PAGE, 3)] and "the node is on fire" in mapping.notes
    mapping.close()
    Mapping(PAGE).close()
    assert len(asked) == 1, "no node, no binding"


def test_close_unmaps_and_may_be_called_twice() -> None:
    mapping = Mapping(4 * HUGE_PAGE)
    address = mapping.address + HUGE_PAGE
    assert is_mapped(address)
    mapping.close()
    mapping.close()
    assert mapping._map.closed


def test_close_leaves_the_memory_to_a_view_of_the_map() -> None:
    mapping = Mapping(PAGE)
    held = memoryview(mapping._map)
    mapping.close()
    assert is_mapped(mapping.address) and held[0] == 0
    held.release()
    mapping.close()
    assert mapping._map.closed


def test_more_than_the_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_available_bytes", lambda: None)
    with pytest.raises(PinnedMemoryError, match=rf"cannot map {1 << 60} bytes of host memory \(.+\); lower cpu_pool"):
        Mapping(1 << 60)
    with pytest.raises(PinnedMemoryError, match="lower cpu_pool_size_bytes"):
        Mapping(1 << 70)


def test_more_than_is_available_is_refused_before_it_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(module.mmap, "mmap", lambda _, nbytes, **options: made.append(nbytes) or real(-1, nbytes, **options))
    monkeypatch.setattr(module, "_available_bytes", lambda: 5 * PAGE)
    with pytest.raises(PinnedMemoryError, match=f"{6 * PAGE} bytes of host memory were asked for and {5 * PAGE} are available"):
        Mapping(6 * PAGE)
    assert not made
    Mapping(5 * PAGE).close()
    assert made == [5 * PAGE + HUGE_PAGE]



@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable:\n", "MemAvailable: much\n", "no colon\n"])
def test_a_machine_that_does_not_say_what_is_available(monkeypatch: pytest.MonkeyPatch, tmp_path, text: str) -> None:
    path = tmp_path / "meminfo"
    path.write_text(text)
    monkeypatch.setattr(module, "open", lambda _: path.open(), raising=False)
    assert module._available_bytes() is None
    path.unlink()
    assert module._available_bytes() is None


def test_available_memory() -> None:
    available = module._available_bytes()
    assert available is None or available > PAGE
