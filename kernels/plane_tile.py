"""A tile of the plane code from a page into shared memory, and its fixed part from there into a record.

A warp loads the next eight rows while it works on eight. It collects codes of a lane's channels in a word and turns that into
words of a tier (:mod:`kvortex.kernels.warp_words`).
"""

from __future__ import annotations

from numba import cuda

from kvortex.kernels.ahead import get2, get4, get16, put1, put2, put2_where, put4, put_pair
from kvortex.kernels.lane import all_here, early4, load4, store4, store16
from kvortex.kernels.plane import int32, place, uint32, uint64, warp_sum
from kvortex.kernels.plane_form import FIXED_BYTES, RAW_ROWS, ROWS, VALUES
from kvortex.kernels.plane_row import FAR, distances, first_codes, inverted, places, sign_bytes
from kvortex.kernels.warp import ALL
from kvortex.kernels.warp_words import summed, turned

# A warp's shared memory: values of the second tier, a tile's fixed part, and where in the second tier eight rows' begin.
FIXED_AT, CELLS_AT = 2 * VALUES, 2 * VALUES + FIXED_BYTES
SHARED_BYTES = CELLS_AT + 128


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
def _two_rows(a, b, three, cells, table, lower):  # type: ignore[no-untyped-def]
    """Puts what two rows have in the second tier behind what those before have: distances, and what exponents follow from."""
    words, more = get16(cells), get16(cells + uint64(16))
    first, other = places(words, table, lower)
    put2_where(first, a, uint32(three & uint32(1)))
    put2_where(other, uint32(a >> uint32(16)), uint32(three & uint32(4)))
    first, other = places(more, table, lower)
    put2_where(first, b, uint32(three & uint32(16)))
    put2_where(other, uint32(b >> uint32(16)), uint32(three & uint32(64)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _put_signs(signs, a, b):  # type: ignore[no-untyped-def]
    """Signs and mantissas of two rows."""
    both = uint32(sign_bytes(a, b))
    put2(signs, both)
    put2(signs + uint64(64), uint32(both >> uint32(16)))


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
def eight_signs(words, signs):  # type: ignore[no-untyped-def]
    """Signs and mantissas of eight rows into shared memory. Behind it all words are there: so whoever needs them does not wait
    for loads that are begun behind it. One scoreboard counts all that is in flight over a branch."""
    _put_signs(signs, uint32(words[0]), uint32(words[1]))
    _put_signs(signs + uint64(128), uint32(words[2]), uint32(words[3]))
    _put_signs(signs + uint64(256), uint32(words[4]), uint32(words[5]))
    _put_signs(signs + uint64(384), uint32(words[6]), uint32(words[7]))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def eight_rows(words, bases, shared, planes, n, lane):  # type: ignore[no-untyped-def]
    """Eight rows into shared memory, words of the first tier at ``planes``; how many values the second tier has now."""
    a, b, c, d = uint32(words[0]), uint32(words[1]), uint32(words[2]), uint32(words[3])
    e, f, g, h = uint32(words[4]), uint32(words[5]), uint32(words[6]), uint32(words[7])
    a, b, c, d = uint32(inverted(a)), uint32(inverted(b)), uint32(inverted(c)), uint32(inverted(d))
    e, f, g, h = uint32(inverted(e)), uint32(inverted(f)), uint32(inverted(g)), uint32(inverted(h))
    p, q, r, s = distances(a, bases), distances(b, bases), distances(c, bases), distances(d, bases)
    t, u, v, w = distances(e, bases), distances(f, bases), distances(g, bases), distances(h, bases)
    low, high = uint32(_four_codes(p, q, r, s)), uint32(_four_codes(t, u, v, w))
    a, b, c, d = _both(a, p), _both(b, q), _both(c, r), _both(d, s)
    e, f, g, h = _both(e, t), _both(f, u), _both(g, v), _both(h, w)
    codes = uint32(low & uint32(0x3333) | (low >> uint32(14)) & uint32(0xCCCC))
    codes = uint32(codes | (high << uint32(16)) & uint32(0x33330000) | (high << uint32(2)) & uint32(0xCCCC0000))
    put4(planes + uint64(4) * uint64(lane), turned(codes, lane))
    cuda.syncwarp()
    mask = uint32(0)
    if lane < uint32(16):
        mask = uint32(get4(planes + uint64(8) * uint64(lane))) & uint32(get4(planes + uint64(8) * uint64(lane) + uint64(4)))
    count = uint32(cuda.popc(uint32(mask)))
    upto = uint32(summed(count, lane))
    cells = shared + uint64(CELLS_AT)
    if lane < uint32(16):
        put_pair(cells + uint64(8) * uint64(lane), mask, shared + uint64(2) * uint64(uint32(n + upto - count)))
    cuda.syncwarp()
    lower = uint32((uint32(1) << lane) - uint32(1))
    three = uint32(codes & (codes >> uint32(1)) & uint32(0x55555555))
    _two_rows(a, b, three, cells, shared, lower)
    _two_rows(c, d, uint32(three >> uint32(8)), cells + uint64(32), shared, lower)
    _two_rows(e, f, uint32(three >> uint32(16)), cells + uint64(64), shared, lower)
    _two_rows(g, h, uint32(three >> uint32(24)), cells + uint64(96), shared, lower)
    return uint32(n + uint32(cuda.shfl_sync(ALL, int32(upto), 31)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def write_fixed(fixed, stage, lane):  # type: ignore[no-untyped-def]
    """A tile's fixed part from shared memory."""
    at = uint64(16) * uint64(lane)
    store16(fixed + at, get16(stage + at))
    store16(fixed + at + uint64(512), get16(stage + at + uint64(512)))
    if lane < uint32(FIXED_BYTES // 16 - 64):
        store16(fixed + at + uint64(1024), get16(stage + at + uint64(1024)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _late(value):  # type: ignore[no-untyped-def]
    """Code of the second tier: 0, 4 to 9 and FAR become 0 to 7."""
    return uint32(max(int32(int32(value & uint32(15)) - int32(3)), int32(0)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def make_tail(tail, n, lane, table):  # type: ignore[no-untyped-def]
    """A tile's tail in shared memory, from the values of its second tier there; how many of these are escapes."""
    lower = uint32((uint32(1) << lane) - uint32(1))
    groups = uint32((n + uint32(31)) >> uint32(5))
    if uint32(n + lane) < uint32(groups << uint32(5)):  # the last group is filled up
        put2(table + uint64(2) * uint64(uint32(n + lane)), uint32(0))
    cuda.syncwarp()
    escapes = uint32(0)
    at = table + uint64(2) * uint64(lane)
    following = uint32(get2(at))
    while groups != uint32(0):
        some = min(groups, uint32(10))  # of so many a lane collects its codes in a word
        groups = uint32(groups - some)
        codes, unit, end = uint32(0), uint32(1), uint32(uint32(1) << uint32(uint32(3) * some))
        while unit != end:
            value = following
            at += uint64(64)
            following = uint32(get2(at))  # on its way while the others vote; behind the last one it is of no use
            code = _late(value)
            mask = uint32(cuda.ballot_sync(ALL, code == uint32(7)))
            if mask != uint32(0):
                cuda.syncwarp()  # a vote orders no memory
                if code == uint32(7):  # to where values were read already: there are no more escapes than these
                    to = uint32(escapes + uint32(cuda.popc(uint32(mask & lower))))
                    put1(table + uint64(to), uint32(uint32(255) - (value >> uint32(8))))
                escapes = uint32(escapes + uint32(cuda.popc(mask)))
                cuda.syncwarp()
            codes = uint32(codes + code * unit)  # a product, of which there is room beside logic
            unit = uint32(unit * uint32(8))
        word = turned(codes, lane)
        if lane < uint32(uint32(3) * some):
            put4(tail + uint64(4) * uint64(lane), word)
        tail += uint64(12) * uint64(some)
    k = lane
    while uint32(4) * k < escapes:
        word = uint32(get4(table + uint64(4) * uint64(k)))
        left = uint32(escapes - uint32(4) * k)
        if left < uint32(4):  # what lies behind the last one in shared memory must not show
            word = uint32(word & uint32((uint32(1) << (uint32(8) * left)) - uint32(1)))
        put4(tail + uint64(4) * uint64(k), word)
        k = uint32(k + uint32(32))
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
