"""What a store holds when it is opened: from its snapshots where it was closed, else from all headers.

Records that were stored are found, those that were evicted and not overwritten may be, and those that were deleted
are not. A header proves nothing about the payload behind it; the read does.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from kvortex.index import BlockIndex
from kvortex.tiers.base import Int64s, Outcome
from kvortex.tiers.disk import snapshot
from kvortex.tiers.disk.pages import PAGE
from kvortex.tiers.disk.places import ANY, NOTHING, Places, marks_of
from kvortex.tiers.disk.slab import Slab
from kvortex.tiers.disk.system import System
from kvortex.tiers.record import HEADER, HEADER_BYTES, Headers, RecordFormat

SCAN_THREADS = 8  # 35 to 62 thousand headers a second with 4 to 16
_WAITING = 2048
_RUN_BYTES = 1 << 20
_SMALL_SLOT = 64 << 10  # up to here a whole slot costs no more to read than its first page
_PART = 4096  # slots whose headers are checked at once
Flags = npt.NDArray[np.bool_]


def recover(slabs: list[Slab], places: Places, form: RecordFormat, index: BlockIndex, system: System) -> bool:
    """Fills places and index; whether all came from snapshots."""
    live = np.zeros(places.count, np.bool_)
    quick = True
    for number, slab in enumerate(slabs):
        mine = slice(number, None, len(slabs))
        if slab.was is None:
            continue
        rows = snapshot.read(slab.folder, slab.was, system)
        if rows is not None and slab.slots == slab.was.slots == len(rows):
            places.keys[mine], places.sizes[mine] = rows["key"], rows["bytes"]
            places.generations[mine] = rows["generation"]
            places.marks[mine], places.before[mine] = rows["mark"], rows["before"]
            live[mine] = rows["live"] == 1
        else:
            quick = False
            headers, unread = scan(slab)
            _take_headers(headers, unread, places, mine, live, form)
    if places.count:
        places.go_on_from(int(places.generations.max()) + 1)
    _fill(newest(places, live), places, index)
    return quick


def _take_headers(
    headers: Headers, unread: Flags, places: Places, mine: slice, live: npt.NDArray[np.bool_], form: RecordFormat
) -> None:
    found = np.concatenate(
        [form.check_headers(part, part["key"]) for part in np.split(headers, range(_PART, len(headers), _PART))]
    )
    ok = found == Outcome.OK
    live[mine] = ok
    places.keys[mine] = np.where(ok[:, None], headers["key"], 0)
    places.sizes[mine] = np.where(ok, headers["payload_bytes"], 0)
    places.generations[mine] = np.where(ok, headers["generation"], 0)
    places.marks[mine] = np.where(ok, marks_of(headers["key"]), NOTHING)
    places.before[mine] = np.where(unread, ANY, NOTHING)


def scan(slab: Slab) -> tuple[Headers, Flags]:
    """(slots,) headers as they lie on disk, and (slots,) bool: which could not be read, whose headers are zeros."""
    headers, unread = np.zeros(slab.slots, HEADER), np.zeros(slab.slots, np.bool_)
    run = max(1, _RUN_BYTES // slab.slot_bytes) if slab.slot_bytes <= _SMALL_SLOT else 1
    mine = threading.local()

    def read(first: int) -> None:
        if not hasattr(mine, "buffer"):
            mine.buffer = memoryview(mmap.mmap(-1, run * slab.slot_bytes if run > 1 else PAGE))
        count = min(run, slab.slots - first)
        buffer = mine.buffer[: count * slab.slot_bytes if run > 1 else PAGE]
        try:
            slab.read_run(slab.offset(first), buffer)
        except OSError:
            if count == 1:
                unread[first] = True
            else:
                one_by_one(first, count)
            return
        for at in range(count):
            start = at * slab.slot_bytes
            headers[first + at] = np.frombuffer(buffer[start : start + HEADER_BYTES], HEADER)[0]

    def one_by_one(first: int, count: int) -> None:
        for slot in range(first, first + count):
            try:
                slab.read_run(slab.offset(slot), mine.buffer[:PAGE])
                headers[slot] = np.frombuffer(mine.buffer[:HEADER_BYTES], HEADER)[0]
            except OSError:
                unread[slot] = True

    for _ in in_threads(read, range(0, slab.slots, run), "kvortex-disk-scan"):
        pass
    return headers, unread


def in_threads(work: Callable[[int], None], numbers: range, name: str) -> Iterator[None]:
    """Works for each number, some at once, in their order; a few thousand wait for a thread, and not the millions there may be,
    each of which takes over a kilobyte."""
    with ThreadPoolExecutor(SCAN_THREADS, name) as pool:
        for first in range(0, len(numbers), _WAITING):
            yield from pool.map(work, numbers[first : first + _WAITING])


def newest(places: Places, live: Flags) -> Int64s:
    """The live places, newest first, and of several with one key only the newest."""
    at = np.flatnonzero(live)
    words = places.keys[at].view(np.uint64).reshape(-1, 4)
    order = np.lexsort((places.generations[at], *words.T))
    at, words = at[order], words[order]
    last = np.ones(len(at), np.bool_)
    last[:-1] = (words[1:] != words[:-1]).any(1)
    at = at[last]
    chosen: Int64s = at[np.argsort(places.generations[at])[::-1]]
    return chosen


def _fill(order: Int64s, places: Places, index: BlockIndex) -> None:
    """Enters records as if they had been stored one after another; the index says which of its slots each gets."""
    made = index.reserve(places.keys[order])
    index.commit(made.slots)
    rest = np.ones(places.count, np.bool_)
    rest[order] = False
    free = np.ones(places.count, np.bool_)
    free[made.slots] = False
    places.of_slot[made.slots] = order
    places.of_slot[free] = np.flatnonzero(rest)
