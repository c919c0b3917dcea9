"""What the kernels of bounded loss share: who works on what, and numbers by eights.

A launch works on ``n_blocks`` records, that of row ``b`` at ``staging + b * pitch``; both are multiples of 16. ``blocks`` has
two numbers a row: its page, and which part of its original it keeps as it is, or -1 where it is coded. A warp takes ``run``
neighbouring tiles at a time: of K 16 tokens of 64 channels, of a V plane 1,024 values in a row, of a part ``TILE_BYTES``. Any
grid works. All other numbers come from ``codec``, uint64 in VRAM: see :mod:`kvortex.kernels.lossy_form`. Planes lie at
multiples of 16.

What a record's bytes are is in :mod:`kvortex.codecs.lossy`; all floats are float32 and each operation rounds once, in the
order that :mod:`kvortex.codecs._lossy` has on the host (:mod:`kvortex.kernels.float32`).

Of K each lane has 8 neighbouring channels of 4 tokens, so that the largest of a channel takes two exchanges; of V it has 32
neighbouring channels of one token: most of a rotation. No codes change lanes: those of 8 neighbours are packed by who has them
(:mod:`kvortex.kernels.packed`).

While a warp works on a tile, the next one's loads are in flight. They are plain ``ld.global``
(:func:`kvortex.kernels.lane.early16`), and their words go nowhere before they are needed.
"""

from __future__ import annotations

from numba import cuda
from numba.cuda import types

from kvortex.kernels.divide import quotient
from kvortex.kernels.eights import differences, from_lane, joined, sums, turned
from kvortex.kernels.float32 import number_of, times, word_of
from kvortex.kernels.lossy_form import (
    ACROSS,
    BODY_BYTES,
    EACH,
    GROUPS,
    HEADER_BYTES,
    KEY_BYTES,
    LANES,
    N_PLANES,
    PLANES,
    TILE_BYTES,
    V_BITS,
    VALUE_BYTES,
)
from kvortex.kernels.warp import uniform

uint32, uint64, int32 = types.uint32, types.uint64, types.int32


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def rotated(a, b, c, d, lane, lanes):  # type: ignore[no-untyped-def]
    """The Hadamard transform of heads that lie in ``lanes`` lanes side by side, 32 numbers in each; what its numbers count,
    a power of two, is left to steps and zeros."""
    a, b, c, d = turned(a), turned(b), turned(c), turned(d)
    a, b, c, d = sums(a, b), differences(a, b), sums(c, d), differences(c, d)
    a, b, c, d = sums(a, c), sums(b, d), differences(a, c), differences(b, d)
    flip = uint32(1)
    while flip < lanes:
        sign = number_of(uint32(0xBF800000) if uint32(lane & flip) != uint32(0) else uint32(0x3F800000))
        a, b = joined(from_lane(a, flip), a, sign), joined(from_lane(b, flip), b, sign)
        c, d = joined(from_lane(c, flip), c, sign), joined(from_lane(d, flip), d, sign)
        flip = uint32(flip << uint32(1))
    return a, b, c, d


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def from_half(half):  # type: ignore[no-untyped-def]
    """The number of an fp16; of bits that are no finite one what comes of them on the host."""
    size = times(number_of(uint32((half & uint32(0x7FFF)) << uint32(13))), number_of(uint32(0x77800000)))
    return number_of(uint32(word_of(size) | (half & uint32(0x8000)) << uint32(16)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def form_of(codec):  # type: ignore[no-untyped-def]
    """Columns of a plane, and its tiles."""
    across = uint32(codec[ACROSS])
    return across, uint32(uint32(codec[GROUPS]) * across)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def values_of(codec, way):  # type: ignore[no-untyped-def]
    """Bits of V, lanes that a head lies in, and what rotated values count, as bits, or 0; the same in all lanes. ``way`` is
    ``FACTOR`` or ``BACK``."""
    return uniform(uint32(codec[V_BITS])), uniform(uint32(codec[LANES])), uniform(uint32(codec[way]))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def plane_of(codec, number):  # type: ignore[no-untyped-def]
    """Whether a plane is K, and where it begins in a record."""
    each = uint32(codec[EACH])
    layer = uint32(quotient(number, uint32(uint32(2) * each)))
    position = uint32(number - layer * uint32(uint32(2) * each))
    keys = uint32(layer * each + min(position, each))
    begin = uint32(uint32(HEADER_BYTES) + keys * uint32(codec[KEY_BYTES]) + uint32(number - keys) * uint32(codec[VALUE_BYTES]))
    return position < each, begin


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def place(codec, form, tile):  # type: ignore[no-untyped-def]
    """A tile's plane, whether that is K, where it begins in a record, and the tile's group and column in it."""
    across, each_tiles = form
    number = uint32(quotient(tile, each_tiles))
    within = uint32(tile - number * each_tiles)
    group = uint32(quotient(within, across))
    key, begin = plane_of(codec, number)
    return number, key, begin, group, uint32(within - group * across)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def after(codec, form, at):  # type: ignore[no-untyped-def]
    """The place behind one, without a division unless it is in another plane."""
    across, each_tiles = form
    number, key, begin, group, column = at
    column = uint32(column + uint32(1))
    if column == across:
        column, group = uint32(0), uint32(group + uint32(1))
        if uint32(group * across) == each_tiles:
            group, number = uint32(0), uint32(number + uint32(1))
            key, begin = plane_of(codec, number)
    return number, key, begin, group, column


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def key_at(form, group, column, lane):  # type: ignore[no-untyped-def]
    """Where a lane's 16 bytes of the first of its four tokens lie in a plane of K, and how far it is from each to the next."""
    row = uint32(uint32(128) * form[0])
    within = uint32(uint32(128) * column + uint32(16) * uint32(lane & uint32(7)))
    return uint32(uint32(uint32(16) * group + uint32(lane >> uint32(3))) * row + within), uint32(uint32(4) * row)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def key_codes_at(form, group, column, bits, lane):  # type: ignore[no-untyped-def]
    """Where codes of 64 channels of a lane's first token begin in a coded plane of K, and how far it is to its next one's."""
    across, each_tiles = form
    row = uint32(uint32(uint32(16) * group + uint32(lane >> uint32(3))) * across + column)
    return uint32(uint32(64) * each_tiles + uint32(8) * bits * row), uint32(uint32(32) * bits * across)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def page_of(codec, number, block):  # type: ignore[no-untyped-def]
    """Where a plane lies in the pages."""
    at = uint32(uint32(PLANES) + uint32(2) * number)
    return codec[at] + uint64(block) * codec[uint32(at + uint32(1))]


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def part_at(codec, part, block, offset):  # type: ignore[no-untyped-def]
    """Where a byte of a part, a multiple of 16, lies in the pages."""
    plane_bytes = uint32(uint32(TILE_BYTES) * uint32(codec[GROUPS]) * uint32(codec[ACROSS]))
    begin = uint32(part * uint32(codec[BODY_BYTES]) + offset)
    number = uint32(quotient(begin, plane_bytes))
    return page_of(codec, number, block) + uint64(uint32(begin - number * plane_bytes))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def part_bytes(codec, part):  # type: ignore[no-untyped-def]
    """Bytes of the original that a part keeps; 0 where there is no such part."""
    body = uint32(codec[BODY_BYTES])
    raw = uint32(uint32(TILE_BYTES) * uint32(codec[N_PLANES]) * uint32(codec[GROUPS]) * uint32(codec[ACROSS]))
    left = uint32(0)
    if uint64(part) * uint64(body) < uint64(raw):
        left = min(uint32(raw - part * body), body)
    return left
