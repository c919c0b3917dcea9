"""What the kernel says of a stretch of this process's memory."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

PAGE = mmap.PAGESIZE


def flags_at(address: int) -> set[str] | None:
    """Flags of the mapping that holds an address (``dc``: not copied by fork, ``hg``: huge pages advised), None where the
    kernel does not tell."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(None, 1)[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside and head == "VmFlags:":
            return set(line.split()[1:])
    return None


def resident_bytes(first: int, last: int) -> int:
    """``Rss`` of all mappings that lie in ``[first, last)``."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(None, 1)[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = first <= low and high <= last
        elif inside and head == "Rss:":
            total += int(line.split()[1]) << 10
    return total


def is_mapped(address: int) -> bool:
    """Whether an address belongs to any mapping."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split(None, 1)[0].split("-"))
        if first <= address < last:
            return True
    return False


def resident_pages(address: int, nbytes: int) -> int:
    """Pages of a page-aligned range that are in RAM now."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = -(-nbytes // PAGE)
    vector = (ctypes.c_ubyte * pages)()
    code = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE), vector)
    assert code == 0, ctypes.get_errno()
    return sum(byte & 1 for byte in vector)
