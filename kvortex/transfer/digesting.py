"""Digests of a transfer on a GPU: what is sent there ahead of it, and read back behind it.

A transfer has two sums for each record, in VRAM beside its block ids (:mod:`kvortex.memory.ids`): a copy of both from pinned
memory, zeros for the sums, comes before the first kernel, and a copy back before the transfer's last event. The kernels that
move bytes add to them. Where DMAs alone move the bytes, a kernel reads the pages: beside the copies of a save, behind those of
a load. Short copies among long ones of their way are on the stream of these, ahead of them: the GPU's one engine for a way may
let those of another stream wait until nothing long is queued any more.

Each of these copies takes a few microseconds, and one block of 2 MiB crosses the link in 44. So in a short transfer every warp
puts the sums of its piece into pinned memory, from where the host adds them up: nothing is sent, and nothing read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.devices.driver import COPY_TO_DEVICE, COPY_TO_HOST, LAUNCH
from kvortex.devices.native import call
from kvortex.jit import njit
from kvortex.transfer.plan import Int32s, Int64s, Plan

# Cells of ``digest``: table of numbers; sums in VRAM and in pinned memory, and their bytes (0: no digests); what is sent ahead,
# from where and its bytes; a kernel that reads, or 0, its table, pieces, ids, blocks, CTAs and threads; stream and event; bytes
# from the sums of a record to the next one's, and of a piece to the next one's, or 0 where a record's are added up; the
# page of the only record, or -1; and of a kernel that reads while DMAs move (kvortex.transfer.issue.early) the flag that is
# raised behind them, or 0, and its value then.
(NUMBERS, SUMS, SUMS_HOST, SUMS_BYTES, SENT_TO, SENT_FROM, SENT_BYTES, KERNEL, TABLE, N_PIECES, IDS, N_BLOCKS, CTAS, THREADS,
 STREAM, EVENT, RECORD_BYTES, PIECE_BYTES, ONLY, FLAG, VALUE) = range(DIGEST_CELLS := 21)  # fmt: skip
NO_DIGESTS = np.zeros(DIGEST_CELLS, np.int64)
NO_DIGESTS[ONLY] = -1
SUM_WORDS = 4  # of an IdBuffer's int32, for both sums of a record
MOST_APART = 2048  # pieces with sums of their own: 32 KiB over the link for 8 MiB of payload, and microseconds to add up
BUFFER_PIECE = 4096  # of kvortex.kernels.reading, which needs numba.cuda to import
Sums = npt.NDArray[np.uint64]


@njit(nogil=True)
def send(functions, digest, stream):  # type: ignore[no-untyped-def]
    """Block ids, or what a kernel that reads needs in their place, and zeros for the sums; the error code."""
    return call(functions[COPY_TO_DEVICE], (digest[SENT_TO], digest[SENT_FROM], digest[SENT_BYTES], stream))


@njit(nogil=True)
def read(functions, digest, stream, parameters, pointers):  # type: ignore[no-untyped-def]
    """Launches the kernel that reads; the error code."""
    parameters[0] = digest[TABLE]
    parameters[1] = digest[N_PIECES]
    parameters[2] = digest[IDS]
    parameters[3] = digest[N_BLOCKS]
    parameters[4] = digest[ONLY]
    parameters[5] = digest[NUMBERS]
    parameters[6] = digest[SUMS]
    parameters[7] = digest[RECORD_BYTES]
    parameters[8] = digest[PIECE_BYTES]
    parameters[9] = digest[FLAG]
    parameters[10] = digest[VALUE]
    shape = (digest[KERNEL], digest[CTAS], 1, 1, digest[THREADS], 1, 1, 0, stream, pointers.ctypes.data, 0)
    return call(functions[LAUNCH], shape)


@njit(nogil=True)
def read_back(functions, digest, stream):  # type: ignore[no-untyped-def]
    """The sums into pinned memory; the error code."""
    return call(functions[COPY_TO_HOST], (digest[SUMS_HOST], digest[SUMS], digest[SUMS_BYTES], stream))


@dataclass(frozen=True)
class Reading:
    """What a kernel reads that digests where DMAs move.

    Parameters
    ----------
    kernel : int
        Handle.
    table : int
        Address of the pieces in VRAM; 0 where ``listed`` is the table.
    n_pieces : int
    listed : (k,) int32
        Block ids, or addresses and bytes of buffers as they lie in memory.
    """

    kernel: int
    table: int
    n_pieces: int
    listed: Int32s


@dataclass(frozen=True)
class Digesting:
    """What is digested of a transfer.

    Parameters
    ----------
    count
        Records.
    numbers
        Address of the table in VRAM.
    reading
        None where the kernels that move bytes digest them.
    apart
        Pieces of a record, all that there are, each of which has sums of its own in pinned memory; 0 where they are added up
        in VRAM.
    coded
        Whether a codec's launches bring the records into their slots, or out of them: these read ids in VRAM, and say of each
        record whether they could. Never where sums are ``apart``.
    summed
        Whether there are sums at all; else only that is told.
    early
        Whether the kernel that reads is launched while DMAs move. Then all of these are one chunk.
    """

    count: int
    numbers: int
    reading: Reading | None = None
    apart: int = 0
    coded: bool = False
    summed: bool = True
    early: bool = False


def pieces_apart(count: int, n_pieces: int) -> int:
    """``apart`` of :class:`Digesting`, for so many records of so many pieces each."""
    return n_pieces if count * n_pieces <= MOST_APART else 0


def buffers_reading(kernel: int, addresses: Int64s, sizes: Int64s) -> Reading:
    """A reading of contiguous buffers in VRAM."""
    rows = np.stack((addresses, sizes), axis=1)
    return Reading(kernel, 0, -(-int(sizes.max()) // BUFFER_PIECE), rows.ravel().view(np.int32))


@dataclass(frozen=True)
class Room:
    """Where a transfer's things lie in an :class:`kvortex.memory.ids.IdBuffer`: first words, and words in all."""

    listed: int
    sums: int
    status: int
    words: int


def room_for(plan: Plan, digesting: Digesting | None, row_words: int) -> Room:
    """Rows of chunks, where a kernel reads them; ids, or what is listed in their place; sums at a multiple of 16 bytes, and
    behind them what codecs say of each record."""
    listed = row_words * len(plan.chunks) if plan.ctas else 0
    reading = digesting.reading if digesting is not None else None
    end = listed + len(plan.ids if reading is None else reading.listed)
    if digesting is None:
        return Room(listed, end, end, end)
    sums = -(-end // SUM_WORDS) * SUM_WORDS
    status = sums + SUM_WORDS * digesting.count * max(1, digesting.apart) * digesting.summed
    return Room(listed, sums, status, status + digesting.count * digesting.coded)


def sums_of(words: Int32s, room: Room, plan: Plan, digesting: Digesting) -> Sums:
    """(n, 2) uint64, a copy: the sums that were read back, or left there piece by piece, in the order of the call."""
    cells = words[room.sums : room.status].view(np.uint64).reshape(digesting.count, -1, 2)
    count = cells.shape[1]
    if count == 1:
        return _in_order(cells[:, 0], plan)
    return _in_order(np.ones(count, np.uint64) @ cells, plan)  # modulo 2**64, and in a third of the time of a sum


def status_of(words: Int32s, room: Room, plan: Plan) -> Int32s:
    """(n,) int32, a copy: what a codec's launches said of each record, in the order of the call; 0 for good ones."""
    return _in_order(words[room.status : room.words], plan)


def _in_order(found: npt.NDArray[Any], plan: Plan) -> npt.NDArray[Any]:
    if not len(plan.order):
        return found.copy()
    made = np.empty_like(found)
    made[plan.order] = found
    return made
