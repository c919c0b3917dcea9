"""Coded records of the plane code into pages, fused with the scatter: the form is in :mod:`kvortex.kernels.plane_form`.

A launch decodes a range of tiles, all or some layers of them, and what lies in staging of each record is just what these
need, side by side: header and table, the fixed parts of the range, and tails from one common offset on. Of all tiles that
is the record as it is.

A warp has the next tile copied into shared memory while it decodes one (:mod:`kvortex.kernels.ahead`), its fixed part and its
tail; of the tiles that it takes at a time, lanes keep table and tails' places. What the second tier says of values is laid out
in shared memory, where a lane finds its own one behind another (:mod:`kvortex.kernels.marked`).

What a record says leads nowhere out of it: header and lengths are checked, every tile's entry against its planes and what lies
there, and where a share's tails begin, which the entries before it say, against the record's room. That all entries come to
what the header says is used, the last share of a record in a launch finds, while others write: so damaged bytes become a
failure of their record, whose page may have been overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels import plane
from kvortex.kernels.ahead import (
    ALIGNED,
    close_batch,
    copy4_below,
    copy16,
    get1,
    get2,
    get4,
    get16,
    put2,
    put16,
    shared_at,
    wait_for_last_but_one,
)
from kvortex.kernels.coded_read import digest_slice
from kvortex.kernels.divide import quotient
from kvortex.kernels.lane import early_cached2, load4, store4
from kvortex.kernels.marked import get_marked
from kvortex.kernels.plane import (
    ACROSS,
    CODED,
    HEADER,
    HEADER_WORDS,
    STORED_AT,
    USED_AT,
    VERBATIM,
    WARPS,
    fixed_bytes,
    head_bytes,
    place,
    tail_bytes,
    tails_before,
    tiles_of,
)
from kvortex.kernels.plane_form import FIXED_BYTES, RAW_TAIL, RAW_TILE, ROWS, SIGN_AT, VALUES
from kvortex.kernels.plane_row import (
    ESCAPED,
    bases_of,
    late_of,
    marks_of,
    nibble_place,
    nibbles_of_sixteen,
    row_word,
    row_word_above,
    sevenths,
    sixteen_places,
)
from kvortex.kernels.shares import answer, ask_next, asker_of, ceil_div, first_share, leave
from kvortex.kernels.warp import ALL, uniform
from kvortex.kernels.warp_words import summed

uint16, uint32, uint64, int32 = plane.uint16, plane.uint32, plane.uint64, plane.int32
SIGNATURE: Any = types.void(
    uint64, uint64, types.CPointer(uint64), uint64, types.CPointer(types.int32), int32, int32, int32, int32, int32, uint64
)
DIGEST_SIGNATURE = plane.DIGEST_SIGNATURE
# A warp's shared memory: the second tier's values, and fixed part and tail of two tiles.
_LATE, _STAGE = 2 * VALUES, FIXED_BYTES + RAW_TAIL
_WARP = _LATE + 2 * _STAGE
_verbatim = plane.verbatim(to_record=False)
_SHARED = WARPS * _WARP // 8


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _words(record, header, lane):  # type: ignore[no-untyped-def]
    """A lane's word of a record's header, and of the codec's own one."""
    word, own = uint32(0), uint32(0)
    if lane < uint32(HEADER_WORDS):
        offset = uint64(4) * uint64(lane)
        word, own = uint32(load4(record + offset)), uint32(load4(header + offset))
    return word, own


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _told(words, lane):  # type: ignore[no-untyped-def]
    """Whether a header is of this codec, its tables and this shape, and both fields that vary; the same in every lane."""
    word, own = words
    same = word == own or lane == uint32(STORED_AT) or lane == uint32(USED_AT)
    ours = uint32(cuda.ballot_sync(ALL, same)) == uint32(0xFFFFFFFF)
    stored = uint32(cuda.shfl_sync(ALL, int32(word), STORED_AT))
    return ours, stored, uint32(cuda.shfl_sync(ALL, int32(word), USED_AT))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def is_ours(record, header, lane):  # type: ignore[no-untyped-def]
    """Whether a header is of this codec, its tables and this shape; the same in every lane."""
    ours, _, _ = _told(_words(record, header, lane), lane)
    return ours


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _fetch(stage, fixed, tail, size, lane):  # type: ignore[no-untyped-def]
    """Begins copies of a tile, as one batch."""
    at = uint64(16) * uint64(lane)
    copy16(stage + at, fixed + at)
    copy16(stage + at + uint64(512), fixed + at + uint64(512))
    if lane < uint32(FIXED_BYTES // 16 - 64):
        copy16(stage + at + uint64(1024), fixed + at + uint64(1024))
    at = uint64(4) * uint64(lane)
    stage += at + uint64(FIXED_BYTES)
    tail += at
    copy4_below(stage, tail, uint32(at), size)
    if size > uint32(128):
        copy4_below(stage + uint64(128), tail + uint64(128), uint32(at) + uint32(128), size)
        if size > uint32(256):
            copy4_below(stage + uint64(256), tail + uint64(256), uint32(at) + uint32(256), size)
            copy4_below(stage + uint64(384), tail + uint64(384), uint32(at) + uint32(384), size)
            copy4_below(stage + uint64(512), tail + uint64(512), uint32(at) + uint32(512), size)
            copy4_below(stage + uint64(640), tail + uint64(640), uint32(at) + uint32(640), size)
    close_batch()


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _escapes(bytes_at, k, n_escapes, late, mask):  # type: ignore[no-untyped-def]
    """Puts exponents of a lane's escapes among eight values, from the ``k``-th of the tile on, where rows look for them; the
    number of the next one."""
    while mask != uint32(0):
        if k < n_escapes:
            place = uint32(nibble_place(uint32(cuda.ffs(int32(mask)))))
            value = uint32(uint32(get1(bytes_at + uint64(k))) << uint32(7) | uint32(ESCAPED))
            put2(late + uint64(2) * uint64(place), value)
        k = uint32(k + uint32(1))
        mask = uint32(mask & uint32(mask - uint32(1)))
    return k


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _put_eight(late, nibbles):  # type: ignore[no-untyped-def]
    low, high = late_of(nibbles), late_of(uint32(nibbles >> uint32(16)))
    put16(late, (low[0], low[1], high[0], high[1]))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _second_tier(tail, late, entry, lane):  # type: ignore[no-untyped-def]
    """Puts the second tier's values where rows look for them. False: it contradicts itself."""
    n_escapes = uint32(entry >> uint32(16))
    sixteens = uint32(uint32(uint32(uint32(entry & uint32(0xFFFF)) + uint32(31)) >> uint32(5)) * uint32(2))
    bytes_at = tail + uint64(6) * uint64(sixteens)
    escapes, first = uint32(0), uint32(0)
    while first < sixteens:  # one for each lane: once, but for a tile that is hard to code
        at = uint32(first + lane)
        own = late + uint64(32) * uint64(at)
        codes, more = uint32(0), uint32(0)
        if at < sixteens:
            places = sixteen_places(tail, at)
            codes, more = nibbles_of_sixteen(uint32(get4(places[0])), uint32(get2(places[1])))
            _put_eight(own, codes)
            _put_eight(own + uint64(16), more)
        mask, other = sevenths(codes), sevenths(more)
        count = uint32(uint32(cuda.popc(mask)) + uint32(cuda.popc(other)))
        upto = uint32(summed(count, lane))
        k = uint32(escapes + upto - count)
        k = _escapes(bytes_at, k, n_escapes, own, mask)
        _escapes(bytes_at, k, n_escapes, own + uint64(16), other)
        escapes = uint32(escapes + uint32(cuda.shfl_sync(ALL, int32(upto), 31)))
        first = uint32(first + uint32(32))
    return escapes == n_escapes


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _two_rows(target, step, codes, after, bases, late, more, signs):  # type: ignore[no-untyped-def]
    """Writes two rows, whose codes of the first tier are ``codes`` and ``after``."""
    store4(target, row_word(codes, bases, late, signs))
    target += step
    store4(target, row_word_above(after, bases, more, signs))
    return target + step


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _eight_rows(target, step, word, marks, bases, late, signs):  # type: ignore[no-untyped-def]
    """Writes eight rows, of whose codes a lane has a word. What they have in the second tier begins at ``late``."""
    other = late + uint64(2) * uint64(uint32(cuda.popc(uint32(marks & uint32(0xFFFF)))))
    own, bits = get_marked(marks, late, other), get16(signs)
    first, after = uint32(word << uint32(7)), uint32(word << uint32(5))
    target = _two_rows(target, step, first, after, bases, own[0], own[1], bits[0])
    first, after = uint32(word << uint32(3)), uint32(word << uint32(1))
    target = _two_rows(target, step, first, after, bases, own[2], own[3], bits[1])
    first, after = uint32(word >> uint32(1)), uint32(word >> uint32(3))
    target = _two_rows(target, step, first, after, bases, own[4], own[5], bits[2])
    first, after = uint32(word >> uint32(5)), uint32(word >> uint32(7))
    return _two_rows(target, step, first, after, bases, own[6], own[7], bits[3])


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _tile(stage, late, entry, target, step, pair, lane):  # type: ignore[no-untyped-def]
    """Writes the tile that lies in shared memory. False: it contradicts itself."""
    at = uint64(4) * uint64(lane)
    word, other = uint32(get4(stage + at)), uint32(get4(stage + at + uint64(128)))
    marks, more = marks_of(word), marks_of(other)
    count = uint32(uint32(cuda.popc(marks)) | uint32(cuda.popc(more)) << uint32(16))  # of both halves at once
    upto = uint32(summed(count, lane))
    good = _second_tier(stage + uint64(FIXED_BYTES), late, entry, lane)
    total = uint32(cuda.shfl_sync(ALL, int32(upto), 31))
    first = uint32(total & uint32(0xFFFF))
    good = good and uint32(first + (total >> uint32(16))) == uint32(entry & uint32(0xFFFF))
    cuda.syncwarp()
    bases = bases_of(pair)
    before = uint32(upto - count)
    signs = stage + uint64(SIGN_AT) + uint64(16) * uint64(lane)
    own = late + uint64(2) * uint64(uint32(before & uint32(0xFFFF)))
    target = _eight_rows(target, step, word, marks, bases, own, signs)
    own = late + uint64(2) * uint64(uint32(first + (before >> uint32(16))))
    _eight_rows(target, step, other, more, bases, own, signs + uint64(512))
    return good


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _raw_tile(stage, target, step, lane):  # type: ignore[no-untyped-def]
    at = stage + uint64(4) * uint64(lane)
    row = uint32(0)
    while row < uint32(ROWS):
        store4(target, get4(at))
        target += step
        at += uint64(128)
        row = uint32(row + uint32(1))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _entry(table, tile, count, lane):  # type: ignore[no-untyped-def]
    """That of a lane's tile of a share."""
    entry = uint32(0)
    if lane < count:
        entry = uint32(load4(table + uint64(4) * uint64(uint32(tile + lane))))
    return entry


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _tiles(codec, block, tile, count, record, entry, fixed_at, tail_at, room, shared, lane):  # type: ignore[no-untyped-def]
    """Writes up to 32 neighbouring tiles, of which each lane has the entry of its own, and of whose tails ``room`` bytes lie
    there at most. False: not all is good."""
    size = tail_bytes(entry)
    where = uint32(uint32(summed(size, lane)) - size)
    # A tail may be none, or lie elsewhere: its tile is left out.
    fits = size <= uint32(RAW_TAIL) and where <= room and size <= uint32(room - where)
    fit = uint32(cuda.ballot_sync(ALL, fits))
    if not fits:
        size = uint32(0)
    where = uint32(where + tail_at)
    good = fit == uint32(0xFFFFFFFF)
    across = uint32(codec[ACROSS])
    column = uint32(tile - quotient(tile, across) * across)
    next_target, step, base = place(codec, tile, block, lane)
    late = shared
    stage = shared + uint64(_LATE)
    _fetch(stage, record + uint64(fixed_at), record + uint64(tail_at), uniform(size), lane)
    next_pair = uint32(early_cached2(base))
    i = uint32(0)
    while i < count:
        target = next_target
        pair = next_pair
        this = stage
        now = uint32(cuda.shfl_sync(ALL, int32(entry), int32(i)))
        fits = uint32((fit >> i) & uint32(1)) == uint32(1)
        i = uint32(i + uint32(1))
        fixed_at = uint32(fixed_at + uint32(FIXED_BYTES))
        stage = shared + uint64(_LATE) + uint64(_STAGE) * uint64(i & uint32(1))
        if i < count:
            column = uint32(column + uint32(1))
            next_target += uint64(128)
            base += uint64(64)
            if column == across:
                column = uint32(0)
                next_target, step, base = place(codec, uint32(tile + i), block, lane)
            tail = record + uint64(uint32(cuda.shfl_sync(ALL, int32(where), int32(i))))
            _fetch(stage, record + uint64(fixed_at), tail, uint32(cuda.shfl_sync(ALL, int32(size), int32(i))), lane)
            next_pair = uint32(early_cached2(base))
        else:
            close_batch()
        wait_for_last_but_one()
        cuda.syncwarp()
        if fits and now == uint32(RAW_TILE):
            _raw_tile(this, target, step, lane)
        elif fits:
            good = _tile(this, late, now, target, step, pair, lane) and good
        cuda.syncwarp()
    return good


def _decoder(digests: bool) -> Callable[..., None]:
    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def decode(  # type: ignore[no-untyped-def]
        staging, pitch, codec, status, blocks, n_blocks, run, first, end, tails_from, numbers, sums, counter
    ):
        all_shared = cuda.shared.array(_SHARED, types.uint64, ALIGNED)
        shared = uint64(shared_at(all_shared.ctypes.data)) + uint64(_WARP) * uint64(cuda.threadIdx.x >> 5)
        lane = uint32(cuda.threadIdx.x & 31)
        tiles = tiles_of(codec)
        count = uint32(uint32(end) - uint32(first))
        each = min(uint32(run), uint32(32))
        runs = ceil_div(count, each)
        heads = head_bytes(codec)
        own_bytes = uint32(heads + uint32(FIXED_BYTES) * count)  # in front of the tails in staging
        room = uint32(uint32(pitch) - own_bytes)
        shares = uint32(uint32(n_blocks) * runs)
        asker = asker_of(shares, lane)
        at = first_share(all_shared, counter, asker)
        while at < shares:
            b = uint32(quotient(at, runs))
            r = uint32(at - uint32(b * runs))
            tile = uint32(r * each)  # counted from the first one that is decoded
            n = min(uint32(count - tile), each)
            record = staging + uint64(b) * pitch
            fits = uint64(own_bytes) <= pitch
            words, table = _words(record, codec[HEADER], lane), record + uint64(4 * HEADER_WORDS)
            entry, before = uint32(0), uint32(0)
            if fits:  # which all are in flight at once, and lead nowhere yet
                entry = _entry(table, uint32(uint32(first) + tile), n, lane)
                before = tails_before(table, uint32(uint32(first) + tile), lane)
            good, stored, used = _told(words, lane)
            if digests:  # before others' copies go to its ring
                live = min(uint64(used), pitch)
                digest_slice(record, pitch, live, r, runs, numbers, sums + uint64(16) * uint64(b), shared, lane)
            ahead_at = ask_next(counter, asker, at)  # no earlier: a register less beside the digest's
            if stored == uint32(CODED):
                good = good and fits
                fixed = uint32(heads + uint32(FIXED_BYTES) * tiles)
                if good and r == uint32(runs - uint32(1)):  # by one share of a record alone: it takes what a tile does
                    good = uint32(fixed + tails_before(table, tiles, lane)) == used
                tail_at = uint32(uint32(fixed + before) - uint32(tails_from))  # before the first one it is beyond all
                good = good and tail_at <= room
                if good:
                    fixed_at = uint32(heads + uint32(FIXED_BYTES) * tile)
                    tile = uint32(uint32(first) + tile)
                    left = uint32(room - tail_at)
                    tail_at = uint32(own_bytes + tail_at)
                    good = _tiles(codec, blocks[b], tile, n, record, entry, fixed_at, tail_at, left, shared, lane)
            else:
                verbatim_bytes = uint32(uint32(4 * HEADER_WORDS) + uint32(2 * VALUES) * tiles)
                good = good and stored == uint32(VERBATIM) and used == verbatim_bytes
                good = good and uint64(used) <= pitch and count == tiles
                if good:
                    _verbatim(record, codec, blocks[b], tile, uint32(tile + n), lane)
            if not good and lane == uint32(0):
                store4(status + uint64(4) * uint64(b), uint32(1))
            at = answer(ahead_at)
        leave(counter, at, shares, asker)

    return decode  # type: ignore[no-any-return]


_decode, _decode_digest = _decoder(False), _decoder(True)


def plane_decode(  # type: ignore[no-untyped-def]
    staging, pitch, codec, status, blocks, n_blocks, run, first, end, tails_from, counter
):
    """Decodes staging into pages.

    Parameters
    ----------
    staging, pitch, codec, blocks, n_blocks, run
        As of :func:`kvortex.kernels.plane_encode.plane_encode`. Nobody writes to staging meanwhile.
    status : uint64
        Address of (n_blocks,) uint32, zeros before the first launch that the records are in; 1 is written for what is no record
        of this codec, and nothing for others, so that launches over several ranges of tiles share it. Its page may have been
        overwritten in part.
    first, end : int32
        Range of tiles.
    tails_from : int32
        Offset in all records of the first tail byte in staging. With all tiles and ``fixed_bytes`` of the codec what lies there
        is a record as it is, which may also be one that is kept verbatim.
    counter : uint64
        Of :mod:`kvortex.kernels.shares`.
    """
    none = uint64(0)
    _decode(staging, pitch, codec, status, blocks, n_blocks, run, first, end, tails_from, none, none, counter)


def plane_decode_digest(  # type: ignore[no-untyped-def]
    staging, pitch, codec, status, blocks, n_blocks, run, numbers, sums, counter
):
    """:func:`plane_decode` of records as they are, which also digests what it reads: all that each uses, as its header says.

    Parameters
    ----------
    numbers, sums : uint64
        As of :func:`kvortex.kernels.coded_read.read_records`.
    """
    fixed, end = int32(fixed_bytes(codec)), int32(tiles_of(codec))
    _decode_digest(staging, pitch, codec, status, blocks, n_blocks, run, int32(0), end, fixed, numbers, sums, counter)
