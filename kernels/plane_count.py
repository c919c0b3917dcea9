"""How long a tile's tail would be, for kernels whose work is another."""

from __future__ import annotations

from numba import cuda

from kvortex.kernels.lane import load2, load4
from kvortex.kernels.plane import place, tail_bytes, uint32, warp_sum
from kvortex.kernels.plane_form import MOST_TAIL, RAW_TILE, ROWS


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
    """A tile's entry in the table; the same in every lane. With few registers."""
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
