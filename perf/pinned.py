"""How long until pinned memory is there: an arena, until its first segment and until the whole, against ``cuMemHostAlloc``?

On the host device, where nothing is pinned, against one thread that touches every page. Both are made and freed in turns. In
each segment of the arena bytes go to the device and back.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from typing import Any

import numpy as np

import kvortex
from kvortex.devices import Device
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import PinnedMemoryError
from kvortex.memory.arena import PinnedArena
from kvortex.memory.mapping import Mapping
from kvortex.memory.numa import node_count
from perf.report import Report, progress

SLOT_BYTES = 2 << 20
DEADLINE_S = 120.0
KEYS = ("method",)
BETTER = {"first_ms": "lower", "whole_ms": "lower", "times_faster": "higher"}
COLUMNS = (*KEYS, "gib", "first_ms", "whole_ms", "times_faster", "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, a row for each way of getting memory, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    nbytes, rounds = (1100 << 20, 1) if quick else (16 << 30, 3)
    other = "cuMemHostAlloc" if isinstance(device, CudaDevice) else "one thread"
    others, firsts, wholes, wrong, notes = [], [], [], 0, {}
    for turn in range(rounds):
        progress(f"{nbytes >> 20} MiB, round {turn + 1} of {rounds}")
        others.append(_other(device, nbytes))
        first, whole, bad, notes = _arena(device, nbytes)
        firsts.append(first)
        wholes.append(whole)
        wrong += bad
    floor, whole = statistics.median(others), statistics.median(wholes)
    common = {"gib": nbytes / 2**30, "wrong_bytes": wrong}
    rows = [
        {"method": other, "first_ms": floor * 1e3, "whole_ms": floor * 1e3, "times_faster": 1.0} | common,
        {"method": "arena", "first_ms": statistics.median(firsts) * 1e3, "whole_ms": whole * 1e3, "times_faster": floor / whole}
        | common,
    ]
    return device.name, rows, {"rounds": rounds, "unit": "ms, medians", "numa_nodes": node_count(), **notes}


def _other(device: Device, nbytes: int) -> float:
    began = time.perf_counter()
    if isinstance(device, CudaDevice):
        address = device.allocate_pinned(nbytes)
        seconds = time.perf_counter() - began
        device.free_pinned(address)
        return seconds
    mapping = Mapping(nbytes)
    ctypes.memset(mapping.address, 0, nbytes)
    seconds = time.perf_counter() - began
    mapping.close()
    return seconds


def _arena(device: Device, nbytes: int) -> tuple[float, float, int, dict[str, Any]]:
    """Seconds to the first segment and to the whole, wrong bytes, and what the memory is like."""
    began = time.perf_counter()
    arena = PinnedArena(device, nbytes, SLOT_BYTES)
    first = time.perf_counter() - began
    try:
        if not arena.wait(arena.slots, DEADLINE_S) or arena.ready < arena.slots:
            raise PinnedMemoryError(f"{arena.ready} of {arena.slots} slots became ready: {'; '.join(arena.notes)}")
        whole = time.perf_counter() - began
        notes = {"huge_page_bytes": _huge_page_bytes(arena.address), "pinned_by": arena.pinned_by, "arena_notes": arena.notes}
        return first, whole, _wrong_bytes(device, arena), notes
    finally:
        arena.close()


def _wrong_bytes(device: Device, arena: PinnedArena) -> int:
    """Bytes that differ after a way to the device and back, in the first and the last slot of each segment, and whether the
    driver knows all of these slots as host memory."""
    rng, buffer, wrong = np.random.default_rng(0), device.allocate(SLOT_BYTES), 0
    ends = {slot for start in range(0, arena.slots, arena.segment_slots) for slot in (start, start + arena.segment_slots - 1)}
    try:
        for slot in sorted(min(end, arena.slots - 1) for end in ends):
            view, data = arena.view(slot), rng.integers(0, 256, SLOT_BYTES, np.uint8)
            wrong += int(view.any()) + (device.owner_of(arena.address + slot * SLOT_BYTES) not in ("host", None))
            view[:] = data
            buffer.write(view)
            view[:] = 0
            view[:] = buffer.read()
            wrong += int((view != data).sum())
    finally:
        buffer.free()
    return wrong


def _huge_page_bytes(address: int) -> int:
    """Of the mapping at an address, as the kernel shows it; 0 where it does not."""
    try:
        with open("/proc/self/smaps") as file:
            inside = False
            for line in file:
                words = line.split()
                if "-" in words[0] and not words[0].endswith(":"):
                    first, last = (int(edge, 16) for edge in words[0].split("-"))
                    inside = first <= address < last
                elif inside and words[0] == "AnonHugePages:":
                    return int(words[1]) << 10
    except (OSError, ValueError):
        pass
    return 0


def draw(axes: Any, report: Report) -> None:
    """A bar for each time."""
    bars = [(f"{row['method']}: {what}", row[f"{what}_ms"]) for row in report.rows for what in ("first", "whole")][1:]
    axes.barh([name for name, _ in bars], [ms for _, ms in bars], color=["#999999", "#d0792a", "#27608f"])
    axes.set_xlabel(f"ms for {report.rows[0]['gib']:.3g} GiB of pinned memory")
    axes.set_title(f"Pinned memory, {report.device}", fontsize=10)
