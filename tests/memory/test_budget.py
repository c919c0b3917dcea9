"""The pool takes what it was allowed and no page more, also where the kernel hands out huge pages."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

from kvortex.devices import HostDevice
from kvortex.memory.arena import PinnedArena
from kvortex.memory.filling import Filler
from kvortex.memory.mapping import HUGE_PAGE, Mapping
from tests.memory.smaps import PAGE, flags_at, resident_bytes, resident_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
huge_pages = pytest.mark.skipif(
    not SETTING.is_file() or "[never]" in SETTING.read_text(), reason="this kernel has no transparent huge pages"
)
SIZES = [1, PAGE, 1 << 20, HUGE_PAGE - PAGE, HUGE_PAGE, HUGE_PAGE + PAGE, 2 * HUGE_PAGE - 1, 65540 << 10]


def taken(mapping: Mapping) -> tuple[int, int]:
    """Bytes in RAM of the whole mapping, slack included: from ``mincore``, and from ``smaps``."""
    base, size = ctypes.addressof(ctypes.c_char.from_buffer(mapping._map)), -(-len(mapping._map) // PAGE) * PAGE
    return resident_pages(base, size) * PAGE, resident_bytes(base, base + size)


@huge_pages
@pytest.mark.parametrize("nbytes", SIZES)
def test_no_page_beyond_the_budget(nbytes: int) -> None:
    mapping = Mapping(nbytes)
    filler = Filler(mapping.address, nbytes)
    filler.start()
    try:
        assert filler.wait(nbytes)
        exact = -(-nbytes // PAGE) * PAGE
        assert taken(mapping) == (exact, exact)
    finally:
        filler.close()
        mapping.close()


@huge_pages
@pytest.mark.parametrize("budget", [1024 << 10, 2052 << 10, 65540 << 10])
def test_a_pool_stays_inside_its_budget(budget: int) -> None:
    arena = PinnedArena(HostDevice(), budget, 4096)
    try:
        assert arena._mapping is not None and max(taken(arena._mapping)) <= budget
    finally:
        arena.close()


@huge_pages
@pytest.mark.parametrize("tail", [0, PAGE, HUGE_PAGE - PAGE])
@pytest.mark.parametrize("whole", [0, 1, 3])
def test_whole_huge_pages_are_asked_for_and_the_rest_refuses_them(whole: int, tail: int) -> None:
    """The refusal is for kernels set to "always", which hand them out unasked."""
    mapping = Mapping(max(1, whole * HUGE_PAGE + tail))
    edge = mapping.address + whole * HUGE_PAGE
    try:
        behind = flags_at(edge)
        if behind is None:
            pytest.skip("this kernel shows no VmFlags")
        assert {"nh", "wf"} <= behind and "hg" not in behind
        for address in (mapping.address, edge - 1) if whole else ():
            assert {"hg", "wf"} <= (flags_at(address) or set())
        assert mapping.notes == []
    finally:
        mapping.close()


def test_a_platform_without_huge_pages_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_NOHUGEPAGE")
    Mapping(HUGE_PAGE + PAGE).close()
