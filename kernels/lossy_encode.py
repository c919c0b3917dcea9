"""Pages into coded records of bounded loss, fused with the gather, in one launch: see :mod:`kvortex.kernels.lossy`.

Whether a record can be coded is known when all its values have been seen. So who ends last with it writes its header, and
that is found by a counter for each record in VRAM. The counters are zeros before a launch and after it.

A warp digests what it has written, in as few ranges as that lies in: whole planes are one, of a part of a plane are scales and
codes apart, and of a part of 16 tokens of K each token's codes.
"""

from __future__ import annotations

from numba import cuda
from numba.cuda import types

from kvortex.kernels import lossy, plane
from kvortex.kernels.digest import add_up
from kvortex.kernels.divide import quotient
from kvortex.kernels.eights import (
    LEAST_SCALE,
    NEAREST,
    differences,
    eight,
    gathered,
    high_codes,
    inverses_of,
    larger_each,
    largest,
    low_codes,
    reaches,
    scale_codes,
    smaller_each,
    smallest,
    value_codes,
)
from kvortex.kernels.flags import mark, take, tell
from kvortex.kernels.float32 import (
    half_down,
    half_up,
    larger,
    minus,
    number_of,
    over,
    plus,
    reach,
    smaller,
    times,
    whole,
    word_of,
)
from kvortex.kernels.lane import early_cached16, early_once16, load4, load16, store2, store4, store8, store16
from kvortex.kernels.lossy import (
    after,
    form_of,
    from_half,
    key_at,
    key_codes_at,
    page_of,
    part_at,
    part_bytes,
    place,
    plane_of,
    rotated,
    values_of,
)
from kvortex.kernels.lossy_form import (
    BODY_BYTES,
    DECLINED,
    FACTOR,
    HEADER_BYTES,
    HEADER_WORDS,
    HEADERS,
    K_BITS,
    LANES,
    MEANS,
    N_PLANES,
    PART_AT,
    STORED_AT,
    TILE_BYTES,
    USED_AT,
    V_BITS,
)
from kvortex.kernels.packed import bit_planes, lower_bits, upper_bits
from kvortex.kernels.shares import answer, ask_next, asker_of, ceil_div, first_share, leave
from kvortex.kernels.warp import ALL, uniform
from kvortex.kernels.written import digest_written_few, zero

SIGNATURE = plane.ENCODE_SIGNATURE
uint32, uint64, int32 = lossy.uint32, lossy.uint64, lossy.int32


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _loaded(form, at, page, means, lane):  # type: ignore[no-untyped-def]
    """A lane's 64 bytes of a tile, and of K the means of its channels; in flight before what earlier tiles store."""
    across, _ = form
    number, key, _, group, column = at
    none = uint32(0)
    mean = none, none, none, none
    if key:
        first, step = key_at(form, group, column, lane)
        source, apart = page + uint64(first), uint64(step)
        p, q = early_once16(source), early_once16(source + apart)
        r, s = early_once16(source + uint64(2) * apart), early_once16(source + uint64(3) * apart)
        channel = uint32(uint32(128) * uint32(number * across + column) + uint32(16) * uint32(lane & uint32(7)))
        mean = early_cached16(means + uint64(channel))
    else:
        source = page + uint64(uint32(uint32(2048) * uint32(group * across + column) + uint32(64) * lane))
        p, q = early_once16(source), early_once16(source + uint64(16))
        r, s = early_once16(source + uint64(32)), early_once16(source + uint64(48))
    return p, q, r, s, mean


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _key_tile(form, group, column, bits, e, f, g, h, plane_at, lane):  # type: ignore[no-untyped-def]
    """16 tokens of 64 channels of K without their means; False where a value is too large, or none."""
    across, _ = form
    token, eighth = uint32(lane >> uint32(3)), uint32(lane & uint32(7))
    found = uint32(scale_codes(reaches(reaches(e, f), reaches(g, h)), lane))
    low, high = gathered(found, lane)
    if token == uint32(0):
        at = uint32(uint32(64) * uint32(group * across + column) + uint32(8) * eighth)
        store8(plane_at + uint64(at), uint64(low) | uint64(high) << uint64(32))
    exponents = uint32(uint32(0x01010101) * uint32(bits + uint32(253 - LEAST_SCALE)))
    inverse = inverses_of(low, high, exponents)
    nearest, count = uint32(NEAREST), uint32(uint32(1) << bits)
    begin, end = whole(uint32(nearest + uint32(count >> uint32(1)))), whole(uint32(nearest + count - uint32(1)))
    a0, a1 = low_codes(e, inverse, begin, end), high_codes(e, inverse, begin, end)
    b0, b1 = low_codes(f, inverse, begin, end), high_codes(f, inverse, begin, end)
    c0, c1 = low_codes(g, inverse, begin, end), high_codes(g, inverse, begin, end)
    d0, d1 = low_codes(h, inverse, begin, end), high_codes(h, inverse, begin, end)
    first, step = key_codes_at(form, group, column, bits, lane)
    codes, apart = plane_at + uint64(first), uint64(step)
    if bits == uint32(8):
        target = codes + uint64(uint32(8) * eighth)
        store8(target, uint64(a0) | uint64(a1) << uint64(32))
        store8(target + apart, uint64(b0) | uint64(b1) << uint64(32))
        store8(target + uint64(2) * apart, uint64(c0) | uint64(c1) << uint64(32))
        store8(target + uint64(3) * apart, uint64(d0) | uint64(d1) << uint64(32))
    else:
        target = codes + uint64(uint32(4) * eighth)
        store4(target, lower_bits(a0, a1))
        store4(target + apart, lower_bits(b0, b1))
        store4(target + uint64(2) * apart, lower_bits(c0, c1))
        store4(target + uint64(3) * apart, lower_bits(d0, d1))
    if bits == uint32(6):
        target = codes + uint64(uint32(uint32(32) + uint32(2) * eighth))
        store2(target, upper_bits(a0, a1))
        store2(target + apart, upper_bits(b0, b1))
        store2(target + uint64(2) * apart, upper_bits(c0, c1))
        store2(target + uint64(3) * apart, upper_bits(d0, d1))
    return uint32(found & uint32(0xFF00FF00)) == uint32(0)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _value_tile(form, group, column, value, a, b, c, d, plane_at, lane):  # type: ignore[no-untyped-def]
    """1,024 values of V in a row; False where one is too large, or none: that of a head with such a value the least or the
    largest is, too, rotated or not."""
    across, each_tiles = form
    bits, lanes, factor = value
    count, times_it = number_of(uint32(0x3F800000)), number_of(uint32(0x3F800000))
    if factor != uint32(0):
        a, b, c, d = rotated(a, b, c, d, lane, lanes)
        count, times_it = number_of(factor), number_of(uint32(uint32(0x7F000000) - factor))  # a power of two, and its inverse
    low = smallest(smaller_each(smaller_each(a, b), smaller_each(c, d)))
    high = largest(larger_each(larger_each(a, b), larger_each(c, d)))
    flip = uint32(1)
    while flip < lanes:
        low = smaller(low, number_of(uint32(cuda.shfl_xor_sync(ALL, int32(word_of(low)), flip))))
        high = larger(high, number_of(uint32(cuda.shfl_xor_sync(ALL, int32(word_of(high)), flip))))
        flip = uint32(flip << uint32(1))
    none = number_of(uint32(0))
    low, high = plus(times(low, count), none), plus(times(high, count), none)  # which makes 0 of -0
    good = word_of(reach(reach(none, low), high)) <= uint32(0x477FE000)  # 65,504
    zero_half = uint32(half_down(low))
    zero = from_half(zero_half)
    step_half = uint32(half_up(over(minus(high, zero), whole(uint32(uint32(uint32(1) << bits) - uint32(1))))))
    step = from_half(step_half)
    inverse = none
    if step_half != uint32(0):
        inverse = times(over(number_of(uint32(0x3F800000)), step), count)
    at = uint32(uint32(32) * uint32(group * across + column) + lane)
    shift = uint32(cuda.popc(uint32(lanes - uint32(1))))  # lanes are a power of two
    if uint32(lane & uint32(lanes - uint32(1))) == uint32(0):
        store4(plane_at + uint64(uint32(uint32(4) * uint32(at >> shift))), uint32(step_half | zero_half << uint32(16)))
    codes = uint32(uint32(uint32(128) * each_tiles >> shift) + uint32(uint32(4) * bits) * at)
    target = plane_at + uint64(codes)
    words = value_codes(a, b, c, d, times(zero, times_it), inverse)
    e, f, g, h, w, x, y, z = words
    if bits == uint32(8):
        store16(target, (e, f, g, h))
        store16(target + uint64(16), (w, x, y, z))
    elif bits == uint32(4):
        store16(target, (lower_bits(e, f), lower_bits(g, h), lower_bits(w, x), lower_bits(y, z)))
    else:
        low, middle, high, _ = bit_planes(words)
        store4(target, low)
        store4(target + uint64(4), middle)
        store4(target + uint64(8), high)
    return good


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _part(codec, tile, part, block, record, lane):  # type: ignore[no-untyped-def]
    """A tile's share of a part: some of the original's bytes, and zeros behind them."""
    nbytes = part_bytes(codec, part)
    body = uint32(codec[BODY_BYTES])
    if tile == uint32(0) and lane < uint32(HEADER_WORDS):
        word = uint32(load4(codec[HEADERS] + uint64(HEADER_BYTES) + uint64(4) * uint64(lane)))
        if lane == uint32(PART_AT):
            word = part
        if lane == uint32(USED_AT):
            word = uint32(uint32(HEADER_BYTES) + nbytes)
        store4(record + uint64(4) * uint64(lane), word)
    offset = uint32(uint32(TILE_BYTES) * tile + uint32(16) * lane)
    end = min(body, uint32(uint32(TILE_BYTES) * uint32(tile + uint32(1))))
    while offset < end:
        none = uint32(0)
        words = (none, none, none, none)
        if offset < nbytes:
            words = load16(part_at(codec, part, block, offset))
        store16(record + uint64(HEADER_BYTES) + uint64(offset), words)
        offset = uint32(offset + uint32(512))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _header(codec, record, declined, tiles, lane):  # type: ignore[no-untyped-def]
    """Of a coded record, by who ends last with it."""
    if lane < uint32(HEADER_WORDS):
        word = uint32(load4(codec[HEADERS] + uint64(4) * uint64(lane)))
        if declined and lane == uint32(STORED_AT):
            word = uint32(DECLINED)
        if declined and lane == uint32(USED_AT):  # as much as it may take: nobody has counted
            word = uint32(uint32(2 * HEADER_BYTES) + uint32(TILE_BYTES) * tiles)
        store4(record + uint64(4) * uint64(lane), word)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _span(codec, form, part, tile, last):  # type: ignore[no-untyped-def]
    """The next tiles of a share, from ``tile`` to ``last``, that lie in like ranges of the record: up to which tile, how many
    ranges, the first one's begin and end, the second one's, and how far it is from there to the third, and so on."""
    across, each = form
    number = uint32(quotient(tile, each))
    within = uint32(tile - number * each)
    key, begin = plane_of(codec, number)
    left = uint32(last - tile)
    none = uint32(0)
    if part >= int32(0):
        begin = uint32(uint32(HEADER_BYTES) + uint32(TILE_BYTES) * tile)
        end = uint32(HEADER_BYTES) + min(uint32(codec[BODY_BYTES]), uint32(uint32(TILE_BYTES) * last))
        found = last, uint32(1), min(begin, end), end, none, none, none
    elif within == none and left >= each:
        planes = uint32(quotient(left, each))
        _, end = plane_of(codec, uint32(number + planes))
        found = uint32(tile + planes * each), uint32(1), begin, end, none, none, none
    elif key:
        bits = uint32(codec[K_BITS])
        group = uint32(quotient(within, across))
        column = uint32(within - group * across)
        columns = min(uint32(across - column), left)
        codes = uint32(begin + uint32(64) * each + uint32(8) * bits * (uint32(16) * group * across + column))
        row = uint32(uint32(8) * bits * across)
        begin = uint32(begin + uint32(64) * within)
        ranges, nbytes = uint32(17), uint32(uint32(8) * bits * columns)
        if columns == across:
            ranges, nbytes = uint32(2), uint32(uint32(16) * nbytes)
        found = uint32(tile + columns), ranges, begin, uint32(begin + uint32(64) * columns), codes, uint32(codes + nbytes), row
    else:
        bits, shift = uint32(codec[V_BITS]), uint32(cuda.popc(uint32(uint32(codec[LANES]) - uint32(1))))
        tiles = min(uint32(each - within), left)
        codes = uint32(begin + uint32(uint32(128) * each >> shift) + uint32(128) * bits * within)
        begin = uint32(begin + uint32(uint32(128) * within >> shift))
        end = uint32(begin + uint32(uint32(128) * tiles >> shift))
        found = uint32(tile + tiles), uint32(2), begin, end, codes, uint32(codes + uint32(128) * bits * tiles), none
    return found


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _digested(codec, form, part, headed, tile, last, record, numbers, lane):  # type: ignore[no-untyped-def]
    """A thread's two sums of what the warp has written of a record: its tiles, and the header, where it has."""
    mine, other = uint64(0), uint64(0)
    ranges, begin, end = uint32(0), uint32(0), uint32(0)
    following, behind, step = uint32(0), uint32(0), uint32(0)
    if headed:
        ranges, end = uint32(1), uint32(HEADER_BYTES)
    while ranges > uint32(0) or tile < last:
        if ranges == uint32(0):
            tile, ranges, begin, end, following, behind, step = _span(codec, form, part, tile, last)
        one, two = digest_written_few(record, begin, end, numbers, lane)
        mine, other = mine + one, other + two
        begin, end = following, behind
        following, behind = uint32(following + step), uint32(behind + step)
        ranges = uint32(ranges - uint32(1))
    return mine, other


def lossy_encode(  # type: ignore[no-untyped-def]
    staging, pitch, codec, counts, blocks, n_blocks, run, numbers, sums, status, counter
):
    """Codes pages into staging, with zeros behind each record, and digests the records.

    Parameters
    ----------
    staging : uint64
        Address of the staging buffer, a multiple of 16; record ``b`` starts at ``staging + b * pitch``.
    pitch : uint64
        Room of a record, and bytes from one to the next: a multiple of 16, at least a slot's. Of a record with a value that
        is not finite, or is too large, the header says that it was declined, and body and digest mean nothing; where there is
        no room, that is so of all, and there are only headers and zeros.
    codec : pointer to uint64
        See :mod:`kvortex.kernels.lossy`.
    counts : uint64
        Address of (n_blocks,) uint32 in VRAM, zeros; zeros again when the kernel has ended.
    blocks : pointer to int32, (n_blocks, 2)
        Page of each record, and which part of it this is, or -1; device memory, or mapped host memory.
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
    lane = uint32(cuda.threadIdx.x & 31)
    form, means = form_of(codec), codec[MEANS]
    key_bits, value = uniform(uint32(codec[K_BITS])), values_of(codec, FACTOR)
    tiles = uint32(uint32(codec[N_PLANES]) * form[1])
    runs = ceil_div(tiles, uint32(run))
    used = uint64(uint32(uint32(HEADER_BYTES) + uint32(codec[BODY_BYTES])))
    fits = used <= pitch
    shares = uint32(uint32(n_blocks) * runs)
    asker = asker_of(shares, lane)
    at = first_share(cuda.shared.array(1, types.uint32), counter, asker)
    while at < shares:
        ahead_at = ask_next(counter, asker, at)
        b = uint32(quotient(at, runs))
        tile = uint32(uint32(at - uint32(b * runs)) * uint32(run))
        last = min(uint32(tile + uint32(run)), tiles)
        record = staging + uint64(b) * pitch
        block, part = blocks[uint32(uint32(2) * b)], blocks[uint32(uint32(2) * b + uint32(1))]
        good = fits
        began, headed = tile, False
        if not fits:
            tile, part = last, int32(-1)
        if part >= int32(0):
            headed = tile == uint32(0)
            while tile < last:
                _part(codec, tile, uint32(part), block, record, lane)
                tile = uint32(tile + uint32(1))
        elif tile < last:
            following = place(codec, form, tile)
            page = page_of(codec, following[0], block)
            ahead = _loaded(form, following, page, means, lane)
            left = uint32(last - tile)
            while left > uint32(0):
                p, q, r, s, mean = ahead
                number, key, begin, group, column = following
                w, x, y, z = eight(p), eight(q), eight(r), eight(s)
                if key:
                    mean = eight(mean)
                    w, x, y, z = differences(w, mean), differences(x, mean), differences(y, mean), differences(z, mean)
                left = uint32(left - uint32(1))
                if left > uint32(0):  # the next one's loads are in flight while this one is coded
                    following = after(codec, form, following)
                    if following[0] != number:
                        page = page_of(codec, following[0], block)
                    ahead = _loaded(form, following, page, means, lane)
                plane_at = record + uint64(begin)
                if key:
                    good = _key_tile(form, group, column, key_bits, w, x, y, z, plane_at, lane) and good
                else:
                    good = _value_tile(form, group, column, value, w, x, y, z, plane_at, lane) and good
        if part < int32(0):
            done = counts + uint64(4) * uint64(b)
            all_good = uint32(cuda.ballot_sync(ALL, good)) == uint32(0xFFFFFFFF)
            before = uint32(0)
            if lane == uint32(0):
                if not all_good:
                    mark(done)
                before = uint32(take(done))
            before = uniform(before)
            if uint32(before & uint32(0x7FFFFFFF)) == uint32(runs - uint32(1)):
                headed = True
                _header(codec, record, before >> uint32(31) != uint32(0), tiles, lane)
                if lane == uint32(0):
                    tell(done, uint32(0))
                    if before >> uint32(31) != uint32(0):
                        store4(status + uint64(4) * uint64(b), uint32(1))
        if began == uint32(0):
            zero(record + (used if fits else uint64(HEADER_BYTES)), record + pitch, lane)
        if sums != uint64(0):
            cuda.syncwarp()  # each lane reads what others wrote
            if not fits:
                began = last
            mine, other = _digested(codec, form, part, headed, began, last, record, numbers, lane)
            add_up(sums + uint64(16) * uint64(b), mine, other, lane)
        at = answer(ahead_at)
    leave(counter, at, shares, asker)
