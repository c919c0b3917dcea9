"""Coded records of codec ``cachegen`` into pages, fused with the scatter.

What a record says is checked before anything is led by it: header, lengths and counts first; then a decoder reads no word
and no escape that its stream has not, and must end as the coder began. So damaged bytes become a failure of their record
and are never followed out of it.
"""

from __future__ import annotations

from numba import cuda
from numba.cuda import types

from kvortex.kernels import cachegen
from kvortex.kernels.cachegen import BODY, bring_tables, extents
from kvortex.kernels.cachegen_form import (
    HALVES,
    KINDS,
    LEAST_STATE,
    MEANS,
    MOST,
    MOST_AT,
    PROBABILITY_BITS,
    ROW,
    STEPS,
    STREAM_PLANES,
    STREAMS,
    TOP,
)
from kvortex.kernels.lane import cached1, cached4, load2, load4, store2, store4
from kvortex.kernels.plane import ACROSS, CODED, GROUPS, HEADER, N_PLANES, PLANES, STORED_AT, USED_AT
from kvortex.kernels.plane_decode import is_ours
from kvortex.kernels.steps import value_at
from kvortex.kernels.warp import ALL, uniform, warp_of_grid, warps_of_grid

SIGNATURE = cachegen.SIGNATURE
uint16, uint32, uint64, int32 = cachegen.uint16, cachegen.uint32, cachegen.uint64, cachegen.int32


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _words_at(words, at, end):  # type: ignore[no-untyped-def]
    """The 32-bit word ``at`` of a stream's words; 0 behind their end."""
    word = uint32(0)
    if at < end:
        word = uint32(load4(words + uint64(4) * uint64(at)))
    return word


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _of(words, k):  # type: ignore[no-untyped-def]
    """Half ``k``, below 64, of the words that the warp's lanes hold."""
    word = uint32(cuda.shfl_sync(ALL, int32(words), int32((k >> uint32(1)) & uint32(31))))
    return uint32((word >> uint32(uint32(16) * (k & uint32(1)))) & uint32(0xFFFF))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _rounded(bits):  # type: ignore[no-untyped-def]
    """A float32 as the nearest bf16."""
    return uint32((bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _search(tables, row, symbol, stride, place):  # type: ignore[no-untyped-def]
    """``stride`` symbols further where that one begins at or before the place."""
    if uint32(tables[uint32(row + symbol + uint32(stride))]) <= place:
        symbol = uint32(symbol + uint32(stride))
    return symbol


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _decode(codec, more, tables, first, last, block, lane, states, n_words, n_escapes):  # type: ignore[no-untyped-def]
    """Decodes a stream, whose states, words and escapes lie one behind the other, into planes ``first`` to ``last``; whether
    it ends as it began."""
    lower = uint32((uint32(1) << lane) - uint32(1))
    across = uint32(uint32(codec[ACROSS]) * uint32(2))
    turns = uint32(uint32(codec[GROUPS]) * uint32(16) * across)
    top = uint32(codec[more + uint32(TOP)])
    words = states + uint64(128)
    pairs = uint32((n_words + uint32(1)) >> uint32(1))
    escapes = words + uint64(4) * uint64(pairs)
    state = uint32(load4(states + uint64(4) * uint64(lane)))
    # The warp holds 128 words of the stream, two a lane in each half; ``inside`` counts those used of the first half.
    near = _words_at(words, lane, pairs)
    ahead = uint32(lane + uint32(32))
    beyond = _words_at(words, ahead, pairs)
    inside = uint32(0)
    taken = uint32(0)
    escaped = uint32(0)
    good = True
    p = uint32(first)
    while p < last and good:
        page = codec[uint32(PLANES) + uint32(2) * p] + uint64(block) * codec[uint32(PLANES + 1) + uint32(2) * p]
        target = page + uint64(2) * uint64(lane)
        step = uint32(cached4(codec[more + uint32(STEPS)] + uint64(4) * uint64(p)))
        channel = uint64(p) * uint64(uint32(32) * across) + uint64(lane)
        kinds = codec[more + uint32(KINDS)] + channel
        means = codec[more + uint32(MEANS)] + uint64(4) * channel
        column = uint32(0)
        kind = uint32(cached1(kinds))
        mean = uint32(cached4(means))
        turn = uint32(0)
        while turn < turns and good:
            row = uint32(uint32(ROW) * kind)
            middle = mean
            column = uint32(column + uint32(1))
            if column == across:
                column = uint32(0)
            kind = uint32(cached1(kinds + uint64(32) * uint64(column)))  # of the next turn
            mean = uint32(cached4(means + uint64(128) * uint64(column)))
            place = uint32(state & uint32((1 << PROBABILITY_BITS) - 1))
            symbol = uint32(0)  # becomes the last one that begins at or before the place
            if top >= uint32(128):
                symbol = _search(tables, row, symbol, 128, place)
            if top >= uint32(64):
                symbol = _search(tables, row, symbol, 64, place)
            symbol = _search(tables, row, symbol, 32, place)
            symbol = _search(tables, row, symbol, 16, place)
            symbol = _search(tables, row, symbol, 8, place)
            symbol = _search(tables, row, symbol, 4, place)
            symbol = _search(tables, row, symbol, 2, place)
            symbol = _search(tables, row, symbol, 1, place)
            start = uint32(tables[uint32(row + symbol)])
            share = uint32(uint32(tables[uint32(row + symbol + uint32(1))]) - start)
            state = uint32(share * uint32(state >> uint32(PROBABILITY_BITS)) + place - start)
            low = state < uint32(LEAST_STATE)
            mask = uint32(cuda.ballot_sync(ALL, low))
            k = uint32(inside + uint32(cuda.popc(uint32(mask & lower))))
            half = _of(near, k)
            count = uint32(cuda.popc(mask))
            taken = uint32(taken + count)
            inside = uint32(inside + count)
            if inside > uint32(64):
                other = _of(beyond, k)
                if k >= uint32(64):
                    half = other
            if low:
                state = uint32((state << uint32(16)) | half)
            good = taken <= n_words
            if inside >= uint32(64):
                inside = uint32(inside - uint32(64))
                near = beyond
                ahead = uint32(ahead + uint32(32))
                beyond = _words_at(words, ahead, pairs)
            most = uint32(tables[uint32(row + uint32(MOST_AT))])
            steps = uint32(symbol - most)
            far = symbol > uint32(uint32(2) * most)
            mask = uint32(cuda.ballot_sync(ALL, far))
            if mask != uint32(0):
                k = uint32(escaped + uint32(cuda.popc(uint32(mask & lower))))
                if far and k < n_escapes:
                    half = uint32(load2(escapes + uint64(2) * uint64(k)))
                    steps = uint32((half ^ uint32(0x8000)) - uint32(0x8000))
                escaped = uint32(escaped + uint32(cuda.popc(mask)))
                good = good and escaped <= n_escapes
            store2(target, _rounded(uint32(value_at(steps, step, middle))))
            target += uint64(64)
            turn = uint32(turn + uint32(1))
        p = uint32(p + uint32(1))
    ended = uint32(cuda.ballot_sync(ALL, state == uint32(LEAST_STATE))) == uint32(0xFFFFFFFF)
    return good and ended and taken == n_words and escaped == n_escapes


def cachegen_decode(staging, pitch, codec, status, blocks, n_blocks, run):  # type: ignore[no-untyped-def]
    """Decodes staging into pages.

    Parameters
    ----------
    staging, pitch, codec, blocks, n_blocks, run
        As of :func:`kvortex.kernels.cachegen_encode.cachegen_encode`. Nobody writes to staging meanwhile.
    status : uint64
        Address of (n_blocks,) uint32, zeros; 1 is written for what is no coded record of this codec, and for one that is kept
        exactly, which no slot has. Its page may have been overwritten in part.
    """
    tables = cuda.shared.array(HALVES, types.uint16)
    more = uint32(uint32(PLANES) + uint32(2) * uint32(codec[N_PLANES]))
    bring_tables(codec, more, tables)
    lane = uint32(cuda.threadIdx.x & 31)
    warp = uniform(warp_of_grid())
    warps = warps_of_grid()
    streams = uint32(codec[more + uint32(STREAMS)])
    per = uint32(codec[more + uint32(STREAM_PLANES)])
    least = uint32(uint32(BODY) + uint32(8) * streams)
    at = warp
    while at < uint32(uint32(n_blocks) * streams):
        b = uint32(at // streams)
        stream = uint32(at - b * streams)
        record = staging + uint64(b) * pitch
        good = is_ours(record, codec[HEADER], lane)
        used = uniform(uint32(load4(record + uint64(4 * USED_AT))))
        good = good and uniform(uint32(load4(record + uint64(4 * STORED_AT)))) == uint32(CODED)
        good = good and uint64(used) <= pitch and used >= least
        if good:
            counts = record + uint64(BODY)
            before, total, fits = extents(counts, stream, streams, uint32(codec[more + uint32(MOST)]), lane)
            good = fits and used == uint32(least + uint32(4) * total)
            if good:
                n_words = uniform(uint32(load4(counts + uint64(8) * uint64(stream))))
                n_escapes = uniform(uint32(load4(counts + uint64(8) * uint64(stream) + uint64(4))))
                states = record + uint64(least) + uint64(4) * uint64(before)
                first = uint32(stream * per)
                last = min(uint32(first + per), uint32(codec[N_PLANES]))
                good = _decode(codec, more, tables, first, last, blocks[b], lane, states, n_words, n_escapes)
        if not good and lane == uint32(0):
            store4(status + uint64(4) * uint64(b), uint32(1))
        at = uint32(at + warps)
