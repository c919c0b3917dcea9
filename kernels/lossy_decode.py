"""Coded records of bounded loss into pages, fused with the scatter: see :mod:`kvortex.kernels.lossy`.

A record's form is known before it is read, so nothing in it but its header leads a kernel: damaged bytes make wrong numbers of
their own page, which the digest of the record's keeper tells.

A launch decodes a range of tiles, whole planes of them. What lies in staging of each record is then the header, where the
range begins with the first plane, and the bytes of just these planes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels import lossy, plane
from kvortex.kernels.ahead import ALIGNED, close_batch, copy16, get16, shared_at, wait_for_all, wait_for_last_but_one
from kvortex.kernels.coded_read import SLICE_SHARED, digest_slice, used_of
from kvortex.kernels.divide import quotient
from kvortex.kernels.eights import (
    LEAST_SCALE,
    brain,
    eight,
    key_numbers,
    scales_of,
    value_numbers,
)
from kvortex.kernels.float32 import number_of, times, whole
from kvortex.kernels.lane import (
    all_here,
    early_cached2,
    early_cached4,
    early_cached8,
    early_cached16,
    load4,
    load16,
    store4,
    store16,
)
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
    rotated,
    values_of,
)
from kvortex.kernels.lossy_form import (
    BACK,
    BODY_BYTES,
    HEADER_BYTES,
    HEADER_WORDS,
    HEADERS,
    K_BITS,
    MEANS,
    N_PLANES,
    PART_AT,
    TILE_BYTES,
    USED_AT,
)
from kvortex.kernels.packed import codes_of_four, codes_of_planes, codes_of_six
from kvortex.kernels.plane_form import WARPS
from kvortex.kernels.shares import answer, ask_next, asker_of, ceil_div, first_share, leave
from kvortex.kernels.warp import ALL, uniform

uint32, uint64, int32 = lossy.uint32, lossy.uint64, lossy.int32
SIGNATURE: Any = types.void(
    uint64, uint64, types.CPointer(uint64), uint64, types.CPointer(types.int32), int32, int32, int32, int32, uint64
)
DIGEST_SIGNATURE: Any = plane.DIGEST_SIGNATURE
_SLOTS = 2 * 128  # a warp's: means of this tile and of the next one


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _is_ours(codec, record, part, lane):  # type: ignore[no-untyped-def]
    """Whether a header is that of a coded record, or of this part; the same in every lane."""
    same = True
    if lane < uint32(HEADER_WORDS):
        offset = uint64(4) * uint64(lane)
        if part < int32(0):
            own = uint32(load4(codec[HEADERS] + offset))
        else:
            own = uint32(load4(codec[HEADERS] + uint64(HEADER_BYTES) + offset))
            if lane == uint32(PART_AT):
                own = uint32(part)
            if lane == uint32(USED_AT):
                own = uint32(uint32(HEADER_BYTES) + part_bytes(codec, uint32(part)))
        same = uint32(load4(record + offset)) == own
    return uint32(cuda.ballot_sync(ALL, same)) == uint32(0xFFFFFFFF)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _slot(slots, left):  # type: ignore[no-untyped-def]
    """That of the tile with so many left in its share, itself among them."""
    return slots + uint64(_SLOTS // 2) * uint64(left & uint32(1))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _key_words(address, apart, bits, lane):  # type: ignore[no-untyped-def]
    """What there is of a lane's 8 channels of four tokens, and zeros: two words of each, or the words of lower bits, then those
    of upper ones. Each way by itself: with one place for lower bits' loads words of 8 bits were moved at once."""
    eighth, none = uint32(lane & uint32(7)), uint32(0)
    a, b, c, d, e, f, g, h = none, none, none, none, none, none, none, none
    if bits == uint32(8):
        at = address + uint64(uint32(8) * eighth)
        p, q = uint64(early_cached8(at)), uint64(early_cached8(at + apart))
        r, s = uint64(early_cached8(at + uint64(2) * apart)), uint64(early_cached8(at + uint64(3) * apart))
        half = uint64(32)
        a, b, c, d = uint32(p), uint32(p >> half), uint32(q), uint32(q >> half)
        e, f, g, h = uint32(r), uint32(r >> half), uint32(s), uint32(s >> half)
    elif bits == uint32(6):
        at = address + uint64(uint32(4) * eighth)
        a, b = uint32(early_cached4(at)), uint32(early_cached4(at + apart))
        c, d = uint32(early_cached4(at + uint64(2) * apart)), uint32(early_cached4(at + uint64(3) * apart))
        at = address + uint64(uint32(uint32(32) + uint32(2) * eighth))
        e, f = uint32(early_cached2(at)), uint32(early_cached2(at + apart))
        g, h = uint32(early_cached2(at + uint64(2) * apart)), uint32(early_cached2(at + uint64(3) * apart))
    else:
        at = address + uint64(uint32(4) * eighth)
        a, b = uint32(early_cached4(at)), uint32(early_cached4(at + apart))
        c, d = uint32(early_cached4(at + uint64(2) * apart)), uint32(early_cached4(at + uint64(3) * apart))
    return a, b, c, d, e, f, g, h


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _value_words(address, bits):  # type: ignore[no-untyped-def]
    """A lane's 3, 4 or 8 words of one token, and zeros. Each way has a load's words in the same places: else they were moved as
    soon as asked for, and that would wait for them."""
    none = uint32(0)
    a, b, c, d, e, f, g, h = none, none, none, none, none, none, none, none
    if bits == uint32(8):
        a, b, c, d = early_cached16(address)
        e, f, g, h = early_cached16(address + uint64(16))
    elif bits == uint32(3):
        a, b, c = early_cached4(address), early_cached4(address + uint64(4)), early_cached4(address + uint64(8))
        all_here()  # else both ways become one, where loads of the one wait for those of the other
    else:
        a, b, c, d = early_cached16(address)
    return a, b, c, d, e, f, g, h


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _loaded(codec, form, at, key_bits, value, plane_at, slot, lane):  # type: ignore[no-untyped-def]
    """A lane's codes of a tile, and scales of K or step and zero of V; in flight before what earlier tiles store. Of K the
    means of its channels go to a slot, as one batch of copies: one scoreboard counts all loads that are in flight over a
    branch, so who loaded means for the tile before would wait for these codes too."""
    across, each_tiles = form
    number, key, _, group, column = at
    tile = uint32(group * across + column)
    if key:
        eighth = uint32(lane & uint32(7))
        codes, apart = key_codes_at(form, group, column, key_bits, lane)
        words = _key_words(plane_at + uint64(codes), uint64(apart), key_bits, lane)
        scales = uint64(early_cached8(plane_at + uint64(uint32(uint32(64) * tile + uint32(8) * eighth))))
        if lane < uint32(8):
            channel = uint32(uint32(128) * uint32(number * across + column) + uint32(16) * lane)
            copy16(slot + uint64(16) * uint64(lane), codec[MEANS] + uint64(channel))
    else:
        bits, lanes, _ = value
        word = uint32(uint32(32) * tile + lane)
        shift = uint32(cuda.popc(uint32(lanes - uint32(1))))  # lanes are a power of two
        codes = uint32(uint32(uint32(128) * each_tiles >> shift) + uint32(uint32(4) * bits) * word)
        words = _value_words(plane_at + uint64(codes), bits)
        scales = uint64(early_cached4(plane_at + uint64(uint32(uint32(4) * uint32(word >> shift)))))
    close_batch()
    return words, scales


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _codes(words, bits):  # type: ignore[no-untyped-def]
    """Of four eights, two words for each, a byte for each code."""
    a, b, c, d, e, f, g, h = words
    if bits == uint32(4):
        words = codes_of_four((a, b, c, d))
    elif bits == uint32(6):
        words = codes_of_six((a, b, c, d), (e, f, g, h))
    elif bits == uint32(3):
        words = codes_of_planes((a, b, c, uint32(0)))
    return words


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _target(form, at, page, lane):  # type: ignore[no-untyped-def]
    """Where a lane's first 16 bytes of a tile go."""
    across, _ = form
    _, key, _, group, column = at
    if key:
        offset, _ = key_at(form, group, column, lane)
    else:
        offset = uint32(uint32(2048) * uint32(group * across + column) + uint32(64) * lane)
    return page + uint64(offset)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _key_tile(form, bits, words, scales, slot, target, magic, lane):  # type: ignore[no-untyped-def]
    """16 tokens of 64 channels of K."""
    wait_for_last_but_one()
    cuda.syncwarp()  # others have copied them
    mean = eight(get16(slot + uint64(16) * uint64(lane & uint32(7))))
    cuda.syncwarp()  # the slot is free
    step = scales_of(
        uint32(scales), uint32(scales >> uint64(32)), uint32(uint32(0x01010101) * uint32(uint32(LEAST_SCALE - 7) - bits))
    )
    a0, a1, b0, b1, c0, c1, d0, d1 = words
    apart = uint64(uint32(uint32(512) * form[0]))
    half = uint32(uint32(256) * uint32(uint32(1) << uint32(bits - uint32(1))))
    middle = whole(uint32(uint32(0x800000) + half - uint32(128)))
    store16(target, key_numbers(a0, a1, middle, step, mean, magic))
    store16(target + apart, key_numbers(b0, b1, middle, step, mean, magic))
    store16(target + uint64(2) * apart, key_numbers(c0, c1, middle, step, mean, magic))
    store16(target + uint64(3) * apart, key_numbers(d0, d1, middle, step, mean, magic))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _value_tile(value, words, both, target, magic, lane):  # type: ignore[no-untyped-def]
    """1,024 values of V in a row."""
    _, lanes, back = value
    step = times(from_half(uint32(both & uint64(0xFFFF))), number_of(uint32(0x3B800000)))  # a 256th
    zero = from_half(uint32(both >> uint64(16)))
    if back != uint32(0):
        step, zero = times(step, number_of(back)), times(zero, number_of(back))
    e, f, g, h, w, x, y, z = words
    a, b = value_numbers(e, f, step, zero, magic), value_numbers(g, h, step, zero, magic)
    c, d = value_numbers(w, x, step, zero, magic), value_numbers(y, z, step, zero, magic)
    if back != uint32(0):
        a, b, c, d = rotated(a, b, c, d, lane, lanes)
    store16(target, brain(a))
    store16(target + uint64(16), brain(b))
    store16(target + uint64(32), brain(c))
    store16(target + uint64(48), brain(d))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _part(codec, tile, part, block, record, lane):  # type: ignore[no-untyped-def]
    """A tile's share of a part."""
    offset = uint32(uint32(TILE_BYTES) * tile + uint32(16) * lane)
    end = min(part_bytes(codec, part), uint32(uint32(TILE_BYTES) * uint32(tile + uint32(1))))
    while offset < end:
        store16(part_at(codec, part, block, offset), load16(record + uint64(HEADER_BYTES) + uint64(offset)))
        offset = uint32(offset + uint32(512))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _in_front(codec, form, tile, tiles):  # type: ignore[no-untyped-def]
    """Bytes of a record before the plane that begins with a tile, header included; of all of it behind the last one."""
    begin = uint32(uint32(HEADER_BYTES) + uint32(codec[BODY_BYTES]))
    if tile < tiles:
        begin = place(codec, form, tile)[2]
    return begin


def _decoder(digests: bool) -> Callable[..., None]:
    warp_shared = _SLOTS + SLICE_SHARED if digests else _SLOTS
    shared_words = WARPS * warp_shared // 8

    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def decode(  # type: ignore[no-untyped-def]
        staging, pitch, codec, status, blocks, n_blocks, run, first, end, numbers, sums, counter
    ):
        all_shared = cuda.shared.array(shared_words, types.uint64, ALIGNED)
        slots = uint64(shared_at(all_shared.ctypes.data)) + uint64(warp_shared) * uint64(cuda.threadIdx.x >> 5)
        lane = uint32(cuda.threadIdx.x & 31)
        form = form_of(codec)
        key_bits, value = uniform(uint32(codec[K_BITS])), values_of(codec, BACK)
        magic = number_of(uint32(uint32(0x4B000000) + uint32(key_bits >> uint32(8))))  # 2**23: no codec has that many bits
        tiles = uint32(uint32(codec[N_PLANES]) * form[1])
        count = uint32(uint32(end) - uint32(first))
        runs = ceil_div(count, uint32(run))
        missing = uint32(0)
        if uint32(first) > uint32(0):
            missing = _in_front(codec, form, uint32(first), tiles)
        allowed = uint32(0)  # bits: records of a codec, and parts
        if uint64(uint32(_in_front(codec, form, uint32(end), tiles) - missing)) <= pitch:
            allowed = uint32(3) if count == tiles else uint32(1)
        allowed = uniform(allowed)  # which keeps one register, and not four of what it is made of
        shares = uint32(uint32(n_blocks) * runs)
        asker = asker_of(shares, lane)
        at = first_share(all_shared, counter, asker)
        while at < shares:
            ahead_at = ask_next(counter, asker, at)
            b = uint32(quotient(at, runs))
            r = uint32(at - uint32(b * runs))
            tile = uint32(uint32(first) + r * uint32(run))
            last = min(uint32(tile + uint32(run)), uint32(end))
            record = staging + uint64(b) * pitch
            if digests:  # first, since nothing of what follows is known yet, and to be kept meanwhile
                ring = slots + uint64(_SLOTS)
                digest_slice(record, pitch, used_of(record, pitch), r, runs, numbers, sums + uint64(16) * uint64(b), ring, lane)
            block, part = blocks[uint32(uint32(2) * b)], blocks[uint32(uint32(2) * b + uint32(1))]
            good = uint32(allowed & (uint32(1) if part < int32(0) else uint32(2))) != uint32(0)
            following = place(codec, form, tile)
            page = page_of(codec, following[0], block)
            none = uint32(0)
            words, scales = (none, none, none, none, none, none, none, none), uint64(0)
            before = record - uint64(missing)
            if good and part < int32(0):  # in flight while the header is looked at, which leads nowhere
                slot = _slot(slots, uint32(last - tile))
                words, scales = _loaded(codec, form, following, key_bits, value, before + uint64(following[2]), slot, lane)
            if good and uint32(first) == uint32(0):
                good = _is_ours(codec, record, part, lane)
            if not good:
                wait_for_all()  # means that nobody asks for, whose slot the next share needs
                if lane == uint32(0):
                    store4(status + uint64(4) * uint64(b), uint32(1))
                tile = last
            if part >= int32(0):
                while tile < last:
                    _part(codec, tile, uint32(part), block, record, lane)
                    tile = uint32(tile + uint32(1))
            elif tile < last:
                left = uint32(last - tile)
                while left > uint32(0):
                    number, key = following[0], following[1]
                    codes, own_scales = _codes(words, key_bits if key else value[0]), scales
                    slot = _slot(slots, left)
                    target = _target(form, following, page, lane)
                    left = uint32(left - uint32(1))
                    if left > uint32(0):  # the next one's loads are in flight while this one is decoded
                        following = after(codec, form, following)
                        if following[0] != number:
                            page = page_of(codec, following[0], block)
                        plane_at, next_slot = before + uint64(following[2]), _slot(slots, left)
                        words, scales = _loaded(codec, form, following, key_bits, value, plane_at, next_slot, lane)
                    else:
                        close_batch()
                    if key:
                        _key_tile(form, key_bits, codes, own_scales, slot, target, magic, lane)
                    else:
                        _value_tile(value, codes, own_scales, target, magic, lane)
            at = answer(ahead_at)
        leave(counter, at, shares, asker)

    return decode  # type: ignore[no-any-return]


_decode, _decode_digest = _decoder(False), _decoder(True)


def lossy_decode(staging, pitch, codec, status, blocks, n_blocks, run, first, end, counter):  # type: ignore[no-untyped-def]
    """Decodes staging into pages.

    Parameters
    ----------
    staging, pitch, codec, blocks, n_blocks, run
        As of :func:`kvortex.kernels.lossy_encode.lossy_encode`. Nobody writes to staging meanwhile.
    status : uint64
        Address of (n_blocks,) uint32, zeros before the first launch that the records are in; 1 is written for what is no record
        of this codec, or another part, and nothing for others. Of all tiles its page is left as it is.
    first, end : int32
        Range of tiles, of whole planes. Where ``first`` is not 0 no header lies there, and none is looked at: the launch that
        begins with 0 tells. Parts are decoded by launches over all tiles alone.
    counter : uint64
        Of :mod:`kvortex.kernels.shares`.
    """
    _decode(staging, pitch, codec, status, blocks, n_blocks, run, first, end, uint64(0), uint64(0), counter)


def lossy_decode_digest(  # type: ignore[no-untyped-def]
    staging, pitch, codec, status, blocks, n_blocks, run, numbers, sums, counter
):
    """:func:`lossy_decode` of all tiles, which also digests what it reads: all that each record uses, as its header says.

    Parameters
    ----------
    numbers, sums : uint64
        As of :func:`kvortex.kernels.coded_read.read_records`.
    """
    _, each = form_of(codec)
    tiles = int32(uint32(uint32(codec[N_PLANES]) * each))
    _decode_digest(staging, pitch, codec, status, blocks, n_blocks, run, int32(0), tiles, numbers, sums, counter)
