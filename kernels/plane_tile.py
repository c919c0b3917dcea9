"""A tile of the plane code from a page into a record, but its tail, which is made in shared memory.

A warp loads the next eight rows while it works on eight. Of these a lane has whole words of the record: codes of the first
tier, signs and mantissas. Values of the second tier gather in shared memory, lane by lane.
"""

from __future__ import annotations

from numba import cuda

from kvortex.kernels.ahead import get1, get2, get16, put1, put2, put4
from kvortex.kernels.lane import all_here, early4, load4, store4, store16
from kvortex.kernels.marked import put_marked
from kvortex.kernels.plane import int32, place, uint32, uint64, warp_sum
from kvortex.kernels.plane_form import FIXED_BYTES, RAW_ROWS, ROWS, SIGN_AT, VALUES
from kvortex.kernels.plane_row import (
    FAR,
    distances,
    first_codes,
    inverted,
    late_codes,
    marks_of,
    nibble_place,
    packed_sixteen,
    sevenths,
    sign_bytes,
    sixteen_places,
)
from kvortex.kernels.warp import ALL
from kvortex.kernels.warp_words import summed
from kvortex.kernels.written import WRITTEN_SHARED

# A warp's shared memory: values of the second tier, or what is digested between tiles.
SHARED_BYTES = max(2 * VALUES, WRITTEN_SHARED)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def eight_words(source, step):  # type: ignore[no-untyped-def]
    """The lane's words of eight rows, in flight together."""
    a = early4(source)
    source += uint64(step)
    b = early4(source)
    source += uint64(step)
    c = early4(source)
    source += uint64(step)
    d = early4(source)
    source += uint64(step)
    e = early4(source)
    source += uint64(step)
    f = early4(source)
    source += uint64(step)
    g = early4(source)
    h = early4(source + uint64(step))
    all_here()
    return a, b, c, d, e, f, g, h


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def beside(codec, tile, block, lane, source, step, base, column):  # type: ignore[no-untyped-def]
    """:func:`place` of the tile behind one whose place is known, with the byte of a row where that begins."""
    source += uint64(128)
    base += uint64(64)
    column = uint32(column + uint32(128))
    if column == step:
        column = uint32(0)
        source, _, base = place(codec, tile, block, lane)
    return source, base, column


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _both(inverse, near_by):  # type: ignore[no-untyped-def]
    """What is kept of two values, in 16 bits each."""
    return uint32(uint32(inverse) * uint32(256) + uint32(near_by))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _four_codes(a, b, c, d):  # type: ignore[no-untyped-def]
    """Codes of four rows' first tier by distances, each in the two lower bits of four."""
    two = uint32(uint32(first_codes(a)) + uint32(first_codes(b)) * uint32(16))
    return uint32(two + uint32(first_codes(c)) * uint32(256) + uint32(first_codes(d)) * uint32(4096) + uint32(0x33333333))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def eight_signs(words, fixed, half, fits, lane):  # type: ignore[no-untyped-def]
    """Signs and mantissas of eight rows into a tile's fixed part, if that ``fits``. Behind it all words are there: so whoever
    needs them does not wait for loads that are begun behind it. One scoreboard counts all that is in flight over a branch."""
    a, b = sign_bytes(words[0], words[1]), sign_bytes(words[2], words[3])
    c, d = sign_bytes(words[4], words[5]), sign_bytes(words[6], words[7])
    if fits:
        store16(fixed + uint64(SIGN_AT + 512 * half) + uint64(16) * uint64(lane), (a, b, c, d))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def eight_rows(words, bases, table, fixed, half, fits, n, lane):  # type: ignore[no-untyped-def]
    """First tier of eight rows into a tile's fixed part, if that ``fits``, and what they have in the second tier behind the
    ``n`` values at ``table``; how many these are now."""
    a, b, c, d = uint32(words[0]), uint32(words[1]), uint32(words[2]), uint32(words[3])
    e, f, g, h = uint32(words[4]), uint32(words[5]), uint32(words[6]), uint32(words[7])
    a, b, c, d = uint32(inverted(a)), uint32(inverted(b)), uint32(inverted(c)), uint32(inverted(d))
    e, f, g, h = uint32(inverted(e)), uint32(inverted(f)), uint32(inverted(g)), uint32(inverted(h))
    p, q, r, s = distances(a, bases), distances(b, bases), distances(c, bases), distances(d, bases)
    t, u, v, w = distances(e, bases), distances(f, bases), distances(g, bases), distances(h, bases)
    even, odd = uint32(_four_codes(p, r, t, v)), uint32(_four_codes(q, s, u, w))
    a, b, c, d = _both(a, p), _both(b, q), _both(c, r), _both(d, s)
    e, f, g, h = _both(e, t), _both(f, u), _both(g, v), _both(h, w)
    codes = uint32(even & uint32(0x33333333) | (odd << uint32(2)) & uint32(0xCCCCCCCC))
    if fits:
        store4(fixed + uint64(128 * half) + uint64(4) * uint64(lane), codes)
    marks = marks_of(codes)
    count = uint32(cuda.popc(marks))
    upto = uint32(summed(count, lane))
    first = table + uint64(2) * uint64(uint32(n + upto - count))
    other = first + uint64(2) * uint64(uint32(cuda.popc(uint32(marks & uint32(0xFFFF)))))
    put_marked((a, b, c, d, e, f, g, h), marks, first, other)
    return uint32(n + uint32(cuda.shfl_sync(ALL, int32(upto), 31)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _put_escapes(target, k, values, mask):  # type: ignore[no-untyped-def]
    """Exponents of a lane's escapes among eight values, from the ``k``-th of the tile on; where the next ones go."""
    while mask != uint32(0):
        place = uint32(nibble_place(uint32(cuda.ffs(int32(mask)))))
        put1(target + uint64(k), uint32(uint32(255) - uint32(get1(values + uint64(1) + uint64(2) * uint64(place)))))
        k = uint32(k + uint32(1))
        mask = uint32(mask & uint32(mask - uint32(1)))
    return k


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def make_tail(tail, n, lane, table):  # type: ignore[no-untyped-def]
    """A tile's tail in shared memory, from the values of its second tier there; how many of these are escapes."""
    groups = uint32((n + uint32(31)) >> uint32(5))
    if uint32(n + lane) < uint32(groups << uint32(5)):  # the last group is filled up
        put2(table + uint64(2) * uint64(uint32(n + lane)), uint32(0))
    cuda.syncwarp()
    target = tail + uint64(12) * uint64(groups)
    escapes, first = uint32(0), uint32(0)
    while first < uint32(groups + groups):  # a sixteen for each lane: once, but for a tile that is hard to code
        at = uint32(first + lane)
        values = table + uint64(32) * uint64(at)
        codes, more = uint32(0), uint32(0)
        if at < uint32(groups + groups):
            a, b = get16(values), get16(values + uint64(16))
            codes = uint32(late_codes(a[0], a[1], a[2], a[3]))
            more = uint32(late_codes(b[0], b[1], b[2], b[3]))
            places, words = sixteen_places(tail, at), packed_sixteen(codes, more)
            put4(places[0], words[0])
            put2(places[1], words[1])
        mask, other = sevenths(codes), sevenths(more)
        count = uint32(uint32(cuda.popc(mask)) + uint32(cuda.popc(other)))
        upto = uint32(summed(count, lane))
        k = uint32(escapes + upto - count)
        k = _put_escapes(target, k, values, mask)
        _put_escapes(target, k, values + uint64(16), other)
        escapes = uint32(escapes + uint32(cuda.shfl_sync(ALL, int32(upto), 31)))
        first = uint32(first + uint32(32))
    if uint32(escapes + lane) < uint32(uint32(escapes + uint32(3)) & uint32(0xFFFFFFFC)):
        put1(target + uint64(uint32(escapes + lane)), uint32(0))
    return escapes


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def count_escapes(n, lane, table):  # type: ignore[no-untyped-def]
    """As :func:`make_tail`, which makes none."""
    escapes = uint32(0)
    k = lane
    while k < n:
        if uint32(get2(table + uint64(2) * uint64(k))) & uint32(15) == uint32(FAR):
            escapes = uint32(escapes + uint32(1))
        k = uint32(k + uint32(32))
    return warp_sum(escapes)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def keep_raw(codec, tile, block, fixed, fits, tail, lane):  # type: ignore[no-untyped-def]
    """A tile as it is: rows that have room in its fixed part there, if that ``fits``, and the others into shared memory."""
    source, step, _ = place(codec, tile, block, lane)
    row = uint32(0)
    while row < uint32(ROWS):
        word = uint32(load4(source))
        at = uint64(uint32(uint32(128) * row + uint32(4) * lane))
        if row >= uint32(RAW_ROWS):
            put4(tail + at - uint64(FIXED_BYTES), word)
        elif fits:
            store4(fixed + at, word)
        source += step
        row = uint32(row + uint32(1))
