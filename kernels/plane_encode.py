"""Pages into coded records of the plane code, fused with the gather: the form is in :mod:`kvortex.kernels.plane_form`.

Two launches, one behind the other on a stream. :func:`plane_count` says how long each tile's tail will be, so that
:func:`plane_encode` can put every tail where it belongs without waiting for others, and knows before it writes whether the
record fits. Both read the pages; VRAM has forty times the link's rate.

A warp loads the next eight rows while it works on eight. It collects codes of a lane's channels in a word and turns that into
words of a tier (:mod:`kvortex.kernels.warp_words`), and puts tiles together in shared memory.
"""

from __future__ import annotations

from numba import cuda
from numba.cuda import types

from kvortex.kernels import plane
from kvortex.kernels.ahead import ALIGNED, get4, get16, near, put1, put2, put4, put4_where, put_pair, shared_at
from kvortex.kernels.digest import add_up
from kvortex.kernels.lane import all_here, early4, early_cached2, load2, load4, store4, store16
from kvortex.kernels.plane import (
    ACROSS,
    CODED,
    DECLINED,
    HEADER,
    HEADER_WORDS,
    STORED_AT,
    TABLE_WORDS,
    USED_AT,
    VERBATIM,
    WARPS,
    place,
    tail_bytes,
    tails,
    tiles_of,
    verbatim_at,
    warp_sum,
)
from kvortex.kernels.plane_form import FIXED_BYTES, MOST_TAIL, RAW_TILE, ROWS, SIGN_AT, VALUES
from kvortex.kernels.plane_row import (
    AT_BASE,
    FAR,
    distances,
    distances_from,
    first_codes,
    lower_halves,
    sign_bytes,
    upper_halves,
)
from kvortex.kernels.shares import answer, ask_next, asker_of, ceil_div, first_share, leave
from kvortex.kernels.warp import ALL
from kvortex.kernels.warp_words import summed, turned
from kvortex.kernels.written import digest_written, zero

SIGNATURE = plane.ENCODE_SIGNATURE
uint32, uint64, int32 = plane.uint32, plane.uint64, plane.int32
# A warp's shared memory: values of the second tier, a tile's fixed part, and where in the second tier eight rows' begin.
_FIXED, _CELLS = 4 * VALUES, 4 * VALUES + FIXED_BYTES
_WARP = _CELLS + 128
_verbatim = plane.verbatim(to_record=True)
_SHARED = WARPS * _WARP // 8


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _eight(source, step):  # type: ignore[no-untyped-def]
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
def _marked(word, bases, r, late, escaped):  # type: ignore[no-untyped-def]
    """Marks of the second and the third tier, with those of row ``r`` of both channels, in bits 15 - r and 31 - r."""
    far = distances(word, bases)
    third = uint32(uint32(far + uint32(0x7FF77FF7)) & uint32(~uint32(uint32(far * uint32(64)) + uint32(0x00400040))))
    late = uint32(late | (uint32(uint32(far + uint32(0x7FFD7FFD)) & uint32(0x80008000)) >> r))
    return late, uint32(escaped | ((third & uint32(0x80008000)) >> r))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _marked8(words, bases, r, late, escaped):  # type: ignore[no-untyped-def]
    late, escaped = _marked(uint32(words[0]), bases, r, late, escaped)
    late, escaped = _marked(uint32(words[1]), bases, uint32(r + uint32(1)), late, escaped)
    late, escaped = _marked(uint32(words[2]), bases, uint32(r + uint32(2)), late, escaped)
    late, escaped = _marked(uint32(words[3]), bases, uint32(r + uint32(3)), late, escaped)
    late, escaped = _marked(uint32(words[4]), bases, uint32(r + uint32(4)), late, escaped)
    late, escaped = _marked(uint32(words[5]), bases, uint32(r + uint32(5)), late, escaped)
    late, escaped = _marked(uint32(words[6]), bases, uint32(r + uint32(6)), late, escaped)
    return _marked(uint32(words[7]), bases, uint32(r + uint32(7)), late, escaped)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _entry(found):  # type: ignore[no-untyped-def]
    """A tile's entry in the table by what each lane found: values of the second tier, of the third in the upper half."""
    entry = warp_sum(found)
    # Both halves are at most 1,024, so no sum carries into the upper one.
    if tail_bytes(entry) > uint32(MOST_TAIL):
        entry = uint32(RAW_TILE)
    return entry


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _counted(exponent, base):  # type: ignore[no-untyped-def]
    """1 for a value of the second tier, and as much in the upper half for one of the third."""
    below = uint32(base - exponent)
    found = uint32(0)
    if uint32(below - uint32(1)) > uint32(2):
        found = uint32(1)
        if below != uint32(0) and uint32(below - uint32(4)) > uint32(5):
            found = uint32(0x10001)
    return found


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def count_tile(codec, tile, block, lane):  # type: ignore[no-untyped-def]
    """A tile's entry in the table; the same in every lane. With few registers: for kernels whose work is another."""
    source, step, base = place(codec, tile, block, lane)
    pair = uint32(load2(base))
    found = uint32(0)
    row = uint32(0)
    while row < uint32(ROWS):
        word = uint32(load4(source))
        source += step
        low = _counted(uint32((word >> uint32(7)) & uint32(255)), uint32(pair & uint32(255)))
        high = _counted(uint32((word >> uint32(23)) & uint32(255)), uint32(pair >> uint32(8)))
        found = uint32(found + low + high)
        row = uint32(row + uint32(1))
    return _entry(found)


def plane_count(  # type: ignore[no-untyped-def]
    staging, pitch, codec, counts, blocks, n_blocks, run, numbers, sums, status, counter
):
    """The table of every record, into ``counts``. Parameters as of :func:`plane_encode`; nothing else is touched."""
    lane = uint32(cuda.threadIdx.x & 31)
    across = uint32(codec[ACROSS])
    tiles = tiles_of(codec)
    runs = ceil_div(tiles, uint32(run))
    shares = uint32(uint32(n_blocks) * runs)
    asker = asker_of(shares, lane)
    at = first_share(cuda.shared.array(1, types.uint32), counter, asker)
    while at < shares:
        ahead_at = ask_next(counter, asker, at)
        b = uint32(at // runs)
        tile = uint32((at - b * runs) * uint32(run))
        last = min(uint32(tile + uint32(run)), tiles)
        table = counts + uint64(4) * (uint64(b) * uint64(tiles) + uint64(tile))
        source, wide, base = place(codec, tile, blocks[b], lane)
        step = uint32(wide)  # a register less
        column = uint32(uint32(128) * tile - tile // across * step)
        next_pair = uint32(early_cached2(base))
        next_words = _eight(source, step)
        while tile < last:
            pair, words = next_pair, next_words
            more = _eight(source + uint64(8) * uint64(step), step)
            tile = uint32(tile + uint32(1))
            bases = distances_from(pair)
            late, escaped = _marked8(words, bases, uint32(0), uint32(0), uint32(0))
            if tile < last:
                source, base, column = _beside(codec, tile, blocks[b], lane, source, step, base, column)
                next_pair = uint32(early_cached2(base))
                next_words = _eight(source, step)
            late, escaped = _marked8(more, bases, uint32(8), late, escaped)
            entry = _entry(uint32(uint32(cuda.popc(late)) + (uint32(cuda.popc(escaped)) << uint32(16))))
            if lane == uint32(0):
                store4(table, entry)
            table += uint64(4)
        at = answer(ahead_at)
    leave(counter, at, shares, asker)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _beside(codec, tile, block, lane, source, step, base, column):  # type: ignore[no-untyped-def]
    """:func:`place` of the tile behind one whose place is known, with the byte of a row where that begins."""
    source += uint64(128)
    base += uint64(64)
    column = uint32(column + uint32(128))
    if column == step:
        column = uint32(0)
        source, _, base = place(codec, tile, block, lane)
    return source, base, column


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _row(far, bases, three, cells, table, lower):  # type: ignore[no-untyped-def]
    """Puts a row's values of the second tier behind those before: distances, and what exponents follow from."""
    words = get16(cells)
    first = near(words[1], table) + uint64(4) * uint64(uint32(cuda.popc(uint32(uint32(words[0]) & lower))))
    other = near(words[3], table) + uint64(4) * uint64(uint32(cuda.popc(uint32(uint32(words[2]) & lower))))
    put4_where(first, lower_halves(far, bases), uint32(three & uint32(1)))
    put4_where(other, upper_halves(far, bases), uint32(three & uint32(4)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _eight_rows(words, bases, shared, planes, signs, n, lane):  # type: ignore[no-untyped-def]
    """Eight rows into shared memory, words of the first tier at ``planes``; how many values the second tier has now."""
    a, b, c, d = uint32(words[0]), uint32(words[1]), uint32(words[2]), uint32(words[3])
    e, f, g, h = uint32(words[4]), uint32(words[5]), uint32(words[6]), uint32(words[7])
    put2(signs, sign_bytes(a))
    put2(signs + uint64(64), sign_bytes(b))
    put2(signs + uint64(128), sign_bytes(c))
    put2(signs + uint64(192), sign_bytes(d))
    put2(signs + uint64(256), sign_bytes(e))
    put2(signs + uint64(320), sign_bytes(f))
    put2(signs + uint64(384), sign_bytes(g))
    put2(signs + uint64(448), sign_bytes(h))
    a, b, c, d = distances(a, bases), distances(b, bases), distances(c, bases), distances(d, bases)
    e, f, g, h = distances(e, bases), distances(f, bases), distances(g, bases), distances(h, bases)
    low = uint32(uint32(first_codes(a)) + uint32(first_codes(b)) * uint32(16))
    low = uint32(low + uint32(first_codes(c)) * uint32(256) + uint32(first_codes(d)) * uint32(4096))
    high = uint32(uint32(first_codes(e)) + uint32(first_codes(f)) * uint32(16))
    high = uint32(high + uint32(first_codes(g)) * uint32(256) + uint32(first_codes(h)) * uint32(4096))
    codes = uint32(low & uint32(0x3333) | (low >> uint32(14)) & uint32(0xCCCC))
    codes = uint32(codes | (high << uint32(16)) & uint32(0x33330000) | (high << uint32(2)) & uint32(0xCCCC0000))
    put4(planes + uint64(4) * uint64(lane), turned(codes, lane))
    cuda.syncwarp()
    mask = uint32(0)
    if lane < uint32(16):
        mask = uint32(get4(planes + uint64(8) * uint64(lane))) & uint32(get4(planes + uint64(8) * uint64(lane) + uint64(4)))
    count = uint32(cuda.popc(uint32(mask)))
    upto = uint32(summed(count, lane))
    cells = shared + uint64(_CELLS)
    if lane < uint32(16):
        put_pair(cells + uint64(8) * uint64(lane), mask, shared + uint64(4) * uint64(uint32(n + upto - count)))
    cuda.syncwarp()
    lower = uint32((uint32(1) << lane) - uint32(1))
    three = uint32(codes & (codes >> uint32(1)) & uint32(0x55555555))
    _row(a, bases, three, cells, shared, lower)
    _row(b, bases, uint32(three >> uint32(4)), cells + uint64(16), shared, lower)
    _row(c, bases, uint32(three >> uint32(8)), cells + uint64(32), shared, lower)
    _row(d, bases, uint32(three >> uint32(12)), cells + uint64(48), shared, lower)
    _row(e, bases, uint32(three >> uint32(16)), cells + uint64(64), shared, lower)
    _row(f, bases, uint32(three >> uint32(20)), cells + uint64(80), shared, lower)
    _row(g, bases, uint32(three >> uint32(24)), cells + uint64(96), shared, lower)
    _row(h, bases, uint32(three >> uint32(28)), cells + uint64(112), shared, lower)
    return uint32(n + uint32(cuda.shfl_sync(ALL, int32(upto), 31)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _write_fixed(fixed, stage, lane):  # type: ignore[no-untyped-def]
    """A tile's fixed part from shared memory."""
    at = uint64(16) * uint64(lane)
    store16(fixed + at, get16(stage + at))
    store16(fixed + at + uint64(512), get16(stage + at + uint64(512)))
    if lane < uint32(FIXED_BYTES // 16 - 64):
        store16(fixed + at + uint64(1024), get16(stage + at + uint64(1024)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _late(far):  # type: ignore[no-untyped-def]
    """Code of the second tier, by a distance."""
    late = min(uint32(far - uint32(2)), uint32(7))
    if far == uint32(AT_BASE):
        late = uint32(0)
    return late


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _write_tail(tail, n, lane, table):  # type: ignore[no-untyped-def]
    """A tile's tail from the values of its second tier in shared memory."""
    lower = uint32((uint32(1) << lane) - uint32(1))
    groups = uint32((n + uint32(31)) >> uint32(5))
    escapes = uint32(0)
    k = lane
    while groups != uint32(0):
        some = min(groups, uint32(10))  # of so many a lane collects its codes in a word
        groups = uint32(groups - some)
        codes = uint32(0)
        shift = uint32(0)
        while shift < uint32(uint32(3) * some):
            value = uint32(get4(table + uint64(4) * uint64(k)))
            code = uint32(0)
            if k < n:
                code = _late(uint32(value & uint32(0xFFFF)))
            mask = uint32(cuda.ballot_sync(ALL, code == uint32(7)))
            if mask != uint32(0):
                cuda.syncwarp()  # a vote orders no memory
                if code == uint32(7):  # to where values were read already: there are no more escapes than these
                    to = uint32(escapes + uint32(cuda.popc(uint32(mask & lower))))
                    put1(table + uint64(to), uint32((value >> uint32(16)) - (value ^ uint32(FAR))))
                escapes = uint32(escapes + uint32(cuda.popc(mask)))
                cuda.syncwarp()
            codes = uint32(codes | code << shift)
            shift = uint32(shift + uint32(3))
            k = uint32(k + uint32(32))
        word = turned(codes, lane)
        if lane < uint32(uint32(3) * some):
            store4(tail + uint64(4) * uint64(lane), word)
        tail += uint64(12) * uint64(some)
    at = lane
    while uint32(4) * at < escapes:
        word = uint32(get4(table + uint64(4) * uint64(at)))
        left = uint32(escapes - uint32(4) * at)
        if left < uint32(4):  # what lies behind the last one in shared memory must not show
            word = uint32(word & uint32((uint32(1) << (uint32(8) * left)) - uint32(1)))
        store4(tail + uint64(4) * uint64(at), word)
        at = uint32(at + uint32(32))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def write_header(record, header, stored, used, lane):  # type: ignore[no-untyped-def]
    """A codec's header with these two fields."""
    if lane < uint32(HEADER_WORDS):
        word = uint32(load4(header + uint64(4) * uint64(lane)))
        if lane == uint32(STORED_AT):
            word = stored
        if lane == uint32(USED_AT):
            word = used
        store4(record + uint64(4) * uint64(lane), word)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _first_raw(fixed, words):  # type: ignore[no-untyped-def]
    """Eight rows of a tile that is kept as it is."""
    store4(fixed, words[0])
    store4(fixed + uint64(128), words[1])
    store4(fixed + uint64(256), words[2])
    store4(fixed + uint64(384), words[3])
    store4(fixed + uint64(512), words[4])
    store4(fixed + uint64(640), words[5])
    store4(fixed + uint64(768), words[6])
    store4(fixed + uint64(896), words[7])


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _last_raw(fixed, tail, words):  # type: ignore[no-untyped-def]
    """The other eight, which have places in the fixed part up to RAW_ROWS."""
    store4(fixed + uint64(1024), words[0])
    store4(fixed + uint64(1152), words[1])
    store4(tail, words[2])
    store4(tail + uint64(128), words[3])
    store4(tail + uint64(256), words[4])
    store4(tail + uint64(384), words[5])
    store4(tail + uint64(512), words[6])
    store4(tail + uint64(640), words[7])


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _tiles(codec, block, tile, count, record, table, fixed_at, tail_at, shared, lane):  # type: ignore[no-untyped-def]
    """Writes up to 32 tiles of a coded record, one at least, whose first fixed part and tail lie there in it.

    Gives how many bytes their tails take.
    """
    entries = uint32(0)
    if lane < count:
        entries = uint32(load4(table + uint64(4) * uint64(uint32(tile + lane))))
        store4(record + uint64(4 * HEADER_WORDS) + uint64(4) * uint64(uint32(tile + lane)), entries)
    size = tail_bytes(entries)
    where = uint32(uint32(uint32(summed(size, lane)) - size) + tail_at)
    across = uint32(codec[ACROSS])
    source, wide, base = place(codec, tile, block, lane)
    step = uint32(wide)  # a register less
    column = uint32(uint32(128) * tile - tile // across * step)
    stage = shared + uint64(_FIXED)
    signs = stage + uint64(SIGN_AT) + uint64(2) * uint64(lane)
    next_pair = uint32(early_cached2(base))
    next_words = _eight(source, step)
    i = uint32(0)
    while i < count:
        pair, words = next_pair, next_words
        more = _eight(source + uint64(8) * uint64(step), step)
        entry = uint32(cuda.shfl_sync(ALL, int32(entries), int32(i)))
        tail = record + uint64(uint32(cuda.shfl_sync(ALL, int32(where), int32(i))))
        fixed = record + uint64(fixed_at)
        bases = distances_from(pair)
        n = uint32(0)
        if entry == uint32(RAW_TILE):
            _first_raw(fixed + uint64(4) * uint64(lane), words)
        else:
            n = _eight_rows(words, bases, shared, stage, signs, n, lane)
        i = uint32(i + uint32(1))
        if i < count:
            source, base, column = _beside(codec, uint32(tile + i), block, lane, source, step, base, column)
            next_pair = uint32(early_cached2(base))
            next_words = _eight(source, step)
        if entry == uint32(RAW_TILE):
            _last_raw(fixed + uint64(4) * uint64(lane), tail + uint64(4) * uint64(lane), more)
        else:
            n = _eight_rows(more, bases, shared, stage + uint64(128), signs + uint64(512), n, lane)
            cuda.syncwarp()
            _write_fixed(fixed, stage, lane)
            _write_tail(tail, n, lane, shared)
        cuda.syncwarp()
        fixed_at = uint32(fixed_at + uint32(FIXED_BYTES))
    return warp_sum(tail_bytes(entries))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _share(codec, at, run):  # type: ignore[no-untyped-def]
    """Of a share its record, first tile, and tiles."""
    tiles, each = tiles_of(codec), min(uint32(run), uint32(32))
    runs = ceil_div(tiles, each)
    b = uint32(at // runs)
    tile = uint32(uint32(at - uint32(b * runs)) * each)
    return b, tile, min(uint32(tiles - tile), each)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _zero_share(record, pitch, stored, used, at, count, lane):  # type: ignore[no-untyped-def]
    """Zeros in one of ``count`` equal parts of what lies behind a record in its room."""
    live = used
    if stored == uint32(DECLINED):
        live = uint32(4 * HEADER_WORDS)
    first = uint32(uint32(live + uint32(15)) & uint32(0xFFFFFFF0))
    each = uint32(uint32(ceil_div(uint32(uint32(pitch) - first), count) + uint32(15)) & uint32(0xFFFFFFF0))
    begin = uint32(first + at * each)
    end = min(uint32(begin + each), uint32(pitch))
    if at == uint32(0):
        begin = live
    if begin < end:
        zero(record + uint64(begin), record + uint64(end), lane)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _written(codec, coded, tile, n, tail_at, size, k):  # type: ignore[no-untyped-def]
    """Where in a record the ``k``-th range lies of what a warp has written for ``n`` tiles: begin and end. The first is the
    record's head, as far as these tiles have a part in it; of coded ones their fixed parts and their tails follow, ``size``
    bytes of these; of others 16 rows of each."""
    begin, end = uint32(0), uint32(4 * HEADER_WORDS)
    if tile != uint32(0):
        begin = end
    if k == uint32(0) and coded:
        end = uint32(uint32(4 * HEADER_WORDS) + uint32(4) * uint32(tile + n))
        if tile != uint32(0):
            begin = uint32(uint32(4 * HEADER_WORDS) + uint32(4) * tile)
    elif k != uint32(0) and not coded:
        row = uint32(k - uint32(1))
        begin = uint32(verbatim_at(codec, uint32(tile + (row >> uint32(4)))))
        begin = uint32(begin + uint32(row & uint32(15)) * uint32(128) * uint32(codec[ACROSS]))
        end = uint32(begin + uint32(128))
    elif k == uint32(1):
        begin = uint32(uint32(4 * HEADER_WORDS) + uint32(4) * uint32(codec[TABLE_WORDS]) + uint32(FIXED_BYTES) * tile)
        end = uint32(begin + uint32(FIXED_BYTES) * n)
    elif k == uint32(2):
        begin = tail_at
        end = uint32(begin + size)
    return begin, end


def plane_encode(  # type: ignore[no-untyped-def]
    staging, pitch, codec, counts, blocks, n_blocks, run, numbers, sums, status, counter
):
    """Codes pages into staging, with zeros behind each record, and digests the records.

    Parameters
    ----------
    staging : uint64
        Address of the staging buffer, a multiple of 16; record ``b`` starts at ``staging + b * pitch``.
    pitch : uint64
        Room of a record, and bytes from one to the next: a multiple of 16. Of a record that needs more there are the header,
        which says how much, and zeros.
    codec : pointer to uint64
        See :mod:`kvortex.kernels.plane`.
    counts : uint64
        Address of (n_blocks, tiles) uint32 in VRAM, filled by :func:`plane_count` with the same blocks.
    blocks : pointer to int32, (n_blocks,)
        Page of each record; device memory, or mapped host memory.
    n_blocks : int32
    run : int32
        Tiles that a warp takes at a time, at least 1.
    numbers, sums : uint64
        As of :func:`kvortex.kernels.paged.gather_digest`; ``sums`` of record ``b`` are the 16 bytes at ``sums + 16 * b``, or 0
        where nothing is digested.
    status : uint64
        Address of (n_blocks,) uint32, zeros; 1 is written for a record that was declined.
    counter : uint64
        Of :mod:`kvortex.kernels.shares`.
    """
    all_shared = cuda.shared.array(_SHARED, types.uint64, ALIGNED)
    shared = uint64(shared_at(all_shared.ctypes.data)) + uint64(_WARP) * uint64(cuda.threadIdx.x >> 5)
    lane = uint32(cuda.threadIdx.x & 31)
    each = min(uint32(run), uint32(32))
    runs = ceil_div(tiles_of(codec), each)
    shares = uint32(uint32(n_blocks) * runs)
    asker = asker_of(shares, lane)
    at = first_share(all_shared, counter, asker)
    while at < shares:
        ahead_at = ask_next(counter, asker, at)
        # loaded again for each run, which takes less than registers do that hold it all the while
        tiles = tiles_of(codec)
        table_words = uint32(codec[TABLE_WORDS])
        fixed_bytes = uint32(uint32(4 * HEADER_WORDS) + uint32(4) * table_words + uint32(FIXED_BYTES) * tiles)
        verbatim_bytes = uint32(uint32(4 * HEADER_WORDS) + uint32(2 * VALUES) * tiles)
        b, tile, n = _share(codec, at, run)
        table = counts + uint64(4) * uint64(b) * uint64(tiles)
        before, total = tails(table, tile, tiles, lane)
        used = uint32(fixed_bytes + total)
        stored = uint32(CODED)
        if used >= verbatim_bytes:
            stored = uint32(VERBATIM)
            used = verbatim_bytes
        if uint64(used) > pitch:
            stored = uint32(DECLINED)
        record = staging + uint64(b) * pitch
        fixed_at = uint32(uint32(4 * HEADER_WORDS) + uint32(4) * table_words + uint32(FIXED_BYTES) * tile)
        tail_at, size, ranges = uint32(fixed_bytes + before), uint32(0), uint32(1)
        if tile == uint32(0):
            write_header(record, codec[HEADER], stored, used, lane)
            if stored == uint32(CODED) and lane < uint32(table_words - tiles):
                store4(record + uint64(4 * HEADER_WORDS) + uint64(4) * uint64(tiles + lane), uint32(0))
            if stored == uint32(DECLINED) and lane == uint32(0):
                store4(status + uint64(4) * uint64(b), uint32(1))
        _zero_share(record, pitch, stored, used, at - b * runs, runs, lane)
        if stored == uint32(VERBATIM):
            _verbatim(record, codec, blocks[b], tile, uint32(tile + n), lane)
            ranges = uint32(uint32(1) + uint32(16) * n)
        elif stored == uint32(CODED):
            size = _tiles(codec, blocks[b], tile, n, record, table, fixed_at, tail_at, shared, lane)
            ranges = uint32(3)
        if sums != uint64(0):
            cuda.syncwarp()  # each lane reads what others wrote
            b, tile, n = _share(codec, at, run)  # again: no register has kept it
            record, coded = staging + uint64(b) * pitch, ranges == uint32(3)
            while ranges > uint32(0):
                ranges = uint32(ranges - uint32(1))
                begin, end = _written(codec, coded, tile, n, tail_at, size, ranges)
                mine, other = digest_written(record, begin, end, numbers, lane)
                add_up(sums + uint64(16) * uint64(b), mine, other, lane)
        at = answer(ahead_at)
    leave(counter, at, shares, asker)
