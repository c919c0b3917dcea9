"""What the kernels of codec ``cachegen`` share: its tables in shared memory, and where a record's streams lie.

:mod:`kvortex.codecs._ranges` has the form. A warp codes a stream, and each lane has one of its 32 coders: a *turn* is a value
of every lane, 32 neighbouring channels of a token. Who needs a word in a turn is told by a vote, and each lane's place among
the words by the votes below it, so words lie in the order in which one decoder after the other would take them.

Arguments are those of :mod:`kvortex.kernels.plane`, and so are the cells of ``codec`` up to those of the planes; behind them,
from ``PLANES + 2 * planes`` on, those of :mod:`kvortex.kernels.cachegen_form`. A CTA has any number of whole warps.
"""

from __future__ import annotations

from typing import Any

from numba import cuda

from kvortex.kernels import plane
from kvortex.kernels.cachegen_form import LANES, N_TABLES, ROW, TABLES
from kvortex.kernels.lane import cached4, load4
from kvortex.kernels.plane import HEADER_WORDS, warp_sum
from kvortex.kernels.warp import ALL

BODY = 4 * HEADER_WORDS

uint8, uint16, uint32, uint64, int32 = plane.uint8, plane.uint16, plane.uint32, plane.uint64, plane.int32
SIGNATURE: Any = plane.SIGNATURE


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def bring_tables(codec, more, tables):  # type: ignore[no-untyped-def]
    """Copies all tables into the CTA's shared memory; every thread calls it."""
    words = uint32(uint32(codec[more + uint32(N_TABLES)]) * uint32(ROW // 2))
    i = uint32(cuda.threadIdx.x)
    while i < words:
        word = uint32(cached4(codec[more + uint32(TABLES)] + uint64(4) * uint64(i)))
        tables[uint32(uint32(2) * i)] = uint16(word & uint32(0xFFFF))
        tables[uint32(uint32(2) * i + uint32(1))] = uint16(word >> uint32(16))
        i = uint32(i + uint32(cuda.blockDim.x))
    cuda.syncthreads()


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def stream_words(words, escapes):  # type: ignore[no-untyped-def]
    """32-bit words of a stream of so many words and escapes, of 16 bits each."""
    return uint32(uint32(LANES) + ((words + uint32(1)) >> uint32(1)) + ((escapes + uint32(1)) >> uint32(1)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def extents(counts, first, streams, most, lane):  # type: ignore[no-untyped-def]
    """From words and escapes of ``streams`` streams at ``counts``: 32-bit words of the streams before ``first``, and of all,
    and whether no stream has more than ``most`` of either. The same in every lane."""
    before = uint32(0)
    total = uint32(0)
    fits = True
    i = uint32(lane)
    while i < streams:
        words = uint32(load4(counts + uint64(8) * uint64(i)))
        escapes = uint32(load4(counts + uint64(8) * uint64(i) + uint64(4)))
        if words > most or escapes > most:
            fits = False
        else:
            size = stream_words(words, escapes)
            total = uint32(total + size)
            if i < first:
                before = uint32(before + size)
        i = uint32(i + uint32(32))
    fits = uint32(cuda.ballot_sync(ALL, fits)) == uint32(0xFFFFFFFF)
    return warp_sum(before), warp_sum(total), fits
