"""Pages into coded records of codec ``cachegen``, fused with the gather.

Two launches, one behind the other on a stream, as of ``plane``. Coders go from a stream's last value to its first, and how many
words they make is only known when they are done: :func:`cachegen_count` lets them run and counts, then
:func:`cachegen_encode` runs them again, knows where each word belongs, and before it writes whether the record fits.
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
    WORST,
)
from kvortex.kernels.lane import cached1, cached4, load2, load4, store2, store4
from kvortex.kernels.plane import (
    ACROSS,
    CODED,
    DECLINED,
    GROUPS,
    HEADER,
    N_PLANES,
    PLANES,
    TABLE_WORDS,
    tail_bytes,
    write_header,
)
from kvortex.kernels.plane_count import count_tile
from kvortex.kernels.plane_form import FIXED_BYTES, VALUES
from kvortex.kernels.steps import quotient, steps_away, whole
from kvortex.kernels.warp import ALL, uniform, warp_of_grid, warps_of_grid

SIGNATURE = cachegen.SIGNATURE
uint16, uint32, uint64, int32 = cachegen.uint16, cachegen.uint32, cachegen.uint64, cachegen.int32
NONE = 0xFFFFFFFF  # what is counted of a stream that has no steps: a value is not finite, or too far away
_FARTHEST = 0x46FFFE00  # 32,767 as a float32


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _code(codec, more, tables, first, last, block, lane, words, n_words, escapes, n_escapes, writes):  # type: ignore[no-untyped-def]
    """Codes planes ``first`` to ``last``: this lane's last state, counts of words and escapes, whether its values have steps.

    With ``writes``, words and escapes go to these addresses, which have room for so many.
    """
    lower = uint32((uint32(1) << lane) - uint32(1))
    across = uint32(uint32(codec[ACROSS]) * uint32(2))
    turns = uint32(uint32(codec[GROUPS]) * uint32(16) * across)
    state = uint32(LEAST_STATE)
    made = uint32(0)
    escaped = uint32(0)
    fine = True
    p = uint32(last)
    while p > first:
        p = uint32(p - uint32(1))
        page = codec[uint32(PLANES) + uint32(2) * p] + uint64(block) * codec[uint32(PLANES + 1) + uint32(2) * p]
        source = page + uint64(64) * uint64(turns - uint32(1)) + uint64(2) * uint64(lane)
        step = uint32(cached4(codec[more + uint32(STEPS)] + uint64(4) * uint64(p)))
        channel = uint64(p) * uint64(uint32(32) * across) + uint64(lane)
        kinds = codec[more + uint32(KINDS)] + channel
        means = codec[more + uint32(MEANS)] + uint64(4) * channel
        column = uint32(across - uint32(1))
        # What the next turn needs is loaded while this one goes on.
        value = uint32(load2(source))
        kind = uint32(cached1(kinds + uint64(32) * uint64(column)))
        mean = uint32(cached4(means + uint64(128) * uint64(column)))
        turn = turns
        while turn > uint32(0):
            turn = uint32(turn - uint32(1))
            row = uint32(uint32(ROW) * kind)
            away = uint32(steps_away(uint32(value << uint32(16)), mean, step))
            if turn > uint32(0):
                source -= uint64(64)
                if column == uint32(0):
                    column = across
                column = uint32(column - uint32(1))
                value = uint32(load2(source))
                kind = uint32(cached1(kinds + uint64(32) * uint64(column)))
                mean = uint32(cached4(means + uint64(128) * uint64(column)))
            fine = fine and uint32(away & uint32(0x7FFFFFFF)) <= uint32(_FARTHEST)
            steps = uint32(whole(away))
            most = uint32(tables[uint32(row + uint32(MOST_AT))])
            symbol = uint32(steps + most)
            far = symbol > uint32(uint32(2) * most)
            if far:
                symbol = uint32(uint32(2) * most + uint32(1))
            mask = uint32(cuda.ballot_sync(ALL, far))
            if mask != uint32(0):
                escaped = uint32(escaped + uint32(cuda.popc(mask)))
                if writes and far:
                    at = uint32(n_escapes - escaped + uint32(cuda.popc(uint32(mask & lower))))
                    if at < n_escapes:
                        store2(escapes + uint64(2) * uint64(at), uint32(steps & uint32(0xFFFF)))
            start = uint32(tables[uint32(row + symbol)])
            share = uint32(uint32(tables[uint32(row + symbol + uint32(1))]) - start)
            full = state >= uint32(share << uint32(32 - PROBABILITY_BITS))
            mask = uint32(cuda.ballot_sync(ALL, full))
            made = uint32(made + uint32(cuda.popc(mask)))
            if full:
                if writes:
                    at = uint32(n_words - made + uint32(cuda.popc(uint32(mask & lower))))
                    if at < n_words:
                        store2(words + uint64(2) * uint64(at), uint32(state & uint32(0xFFFF)))
                state = uint32(state >> uint32(16))
            high = uint32(quotient(state, share))
            state = uint32((high << uint32(PROBABILITY_BITS)) + state - uint32(high * share) + start)
    return state, made, escaped, fine


def cachegen_count(staging, pitch, codec, counts, blocks, n_blocks, run):  # type: ignore[no-untyped-def]
    """Words and escapes of every stream, into ``counts``. Parameters as of :func:`cachegen_encode`; ``staging`` is not
    touched."""
    tables = cuda.shared.array(HALVES, types.uint16)
    more = uint32(uint32(PLANES) + uint32(2) * uint32(codec[N_PLANES]))
    bring_tables(codec, more, tables)
    lane = uint32(cuda.threadIdx.x & 31)
    warp = uniform(warp_of_grid())
    warps = warps_of_grid()
    streams = uint32(codec[more + uint32(STREAMS)])
    per = uint32(codec[more + uint32(STREAM_PLANES)])
    at = warp
    while at < uint32(uint32(n_blocks) * streams):
        b = uint32(at // streams)
        first = uint32((at - b * streams) * per)
        last = min(uint32(first + per), uint32(codec[N_PLANES]))
        nowhere = uint64(0)
        none = uint32(0)
        _, words, escapes, fine = _code(
            codec, more, tables, first, last, blocks[b], lane, nowhere, none, nowhere, none, False
        )
        if uint32(cuda.ballot_sync(ALL, fine)) != uint32(0xFFFFFFFF):
            words = uint32(NONE)
            escapes = uint32(NONE)
        if lane < uint32(2):
            store4(counts + uint64(8) * uint64(at) + uint64(4) * uint64(lane), words if lane == uint32(0) else escapes)
        at = uint32(at + warps)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _kept_bytes(codec, block, lane):  # type: ignore[no-untyped-def]
    """Bytes of a record that keeps every bit, with its two headers."""
    tiles = uint32(uint32(codec[N_PLANES]) * uint32(codec[GROUPS]) * uint32(codec[ACROSS]))
    size = uint32(uint32(BODY) + uint32(4) * uint32(codec[TABLE_WORDS]) + uint32(FIXED_BYTES) * tiles)
    tile = uint32(0)
    while tile < tiles:
        size = uint32(size + tail_bytes(count_tile(codec, tile, block, lane)))
        tile = uint32(tile + uint32(1))
    return uint32(uint32(BODY) + min(size, uint32(uint32(BODY) + uint32(2 * VALUES) * tiles)))


def cachegen_encode(staging, pitch, codec, counts, blocks, n_blocks, run):  # type: ignore[no-untyped-def]
    """Codes pages into staging.

    Parameters
    ----------
    staging, pitch, blocks, n_blocks
        As of :func:`kvortex.kernels.plane_encode.plane_encode`. What only ``plane`` can keep (a value that is not finite, or
        too far away for steps) is declined as if it were too long, since it never fits ``slot_bytes``.
    codec : pointer to uint64
        See :mod:`kvortex.kernels.cachegen`.
    counts : uint64
        Address of (n_blocks, streams, 2) uint32 in VRAM, filled by :func:`cachegen_count` with the same blocks. Nobody
        writes to the pages between.
    run : int32
        Not used: a warp takes a stream at a time.
    """
    tables = cuda.shared.array(HALVES, types.uint16)
    more = uint32(uint32(PLANES) + uint32(2) * uint32(codec[N_PLANES]))
    bring_tables(codec, more, tables)
    lane = uint32(cuda.threadIdx.x & 31)
    warp = uniform(warp_of_grid())
    warps = warps_of_grid()
    streams = uint32(codec[more + uint32(STREAMS)])
    per = uint32(codec[more + uint32(STREAM_PLANES)])
    at = warp
    while at < uint32(uint32(n_blocks) * streams):
        b = uint32(at // streams)
        stream = uint32(at - b * streams)
        own = counts + uint64(8) * uint64(b) * uint64(streams)
        before, total, fits = extents(own, stream, streams, uint32(codec[more + uint32(MOST)]), lane)
        record = staging + uint64(b) * pitch
        bodies = record + uint64(BODY) + uint64(8) * uint64(streams)
        used = uint32(uint32(BODY) + uint32(8) * streams + uint32(4) * total)
        stored = uint32(CODED)
        if not fits or uint64(used) > codec[more + uint32(WORST)]:
            stored = uint32(DECLINED)
            if stream == uint32(0):
                used = _kept_bytes(codec, blocks[b], lane)
        elif uint64(used) > pitch:
            stored = uint32(DECLINED)
        if stream == uint32(0):
            write_header(record, codec[HEADER], stored, used, lane)
        if stored == uint32(CODED):
            n_words = uniform(uint32(load4(own + uint64(8) * uint64(stream))))
            n_escapes = uniform(uint32(load4(own + uint64(8) * uint64(stream) + uint64(4))))
            states = bodies + uint64(4) * uint64(before)
            words = states + uint64(128)
            escapes = words + uint64(4) * uint64((n_words + uint32(1)) >> uint32(1))
            first = uint32(stream * per)
            last = min(uint32(first + per), uint32(codec[N_PLANES]))
            state, _, _, _ = _code(
                codec, more, tables, first, last, blocks[b], lane, words, n_words, escapes, n_escapes, True
            )
            store4(states + uint64(4) * uint64(lane), state)
            if lane < uint32(2):
                count = n_words if lane == uint32(0) else n_escapes
                store4(record + uint64(BODY) + uint64(8) * uint64(stream) + uint64(4) * uint64(lane), count)
                end = words if lane == uint32(0) else escapes
                if count & uint32(1) != uint32(0):
                    store2(end + uint64(2) * uint64(count), uint32(0))
        at = uint32(at + warps)
