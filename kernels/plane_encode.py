"""Pages into coded records of the plane code, fused with the gather: the form is in :mod:`kvortex.kernels.plane_form`.

Two launches, one behind the other on a stream. :func:`plane_count` says how long each tile's tail will be, so that
:func:`plane_encode` can put every tail where it belongs without waiting for others, and knows before it writes whether the
record fits. Both read the pages; VRAM has forty times the link's rate.
"""

from __future__ import annotations

from numba import cuda
from numba.cuda import types

from kvortex.kernels import plane
from kvortex.kernels.lane import load2, load4, store4
from kvortex.kernels.plane import (
    ACROSS,
    ALL,
    CODED,
    DECLINED,
    GROUPS,
    HEADER,
    HEADER_WORDS,
    N_PLANES,
    STORED_AT,
    TABLE_WORDS,
    USED_AT,
    VERBATIM,
    WARPS,
    place,
    tail_bytes,
    tails,
    uniform,
    verbatim_at,
    warp_sum,
)
from kvortex.kernels.plane_form import FIXED_BYTES, MOST_TAIL, RAW_ROWS, RAW_TILE, ROWS, SIGN_AT, VALUES

SIGNATURE = plane.SIGNATURE
uint8, uint32, uint64, int32 = plane.uint8, plane.uint32, plane.uint64, plane.int32


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
    """A tile's entry in the table; the same in every lane."""
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
    entry = warp_sum(found)
    # Both halves are at most 1,024, so no sum carries into the upper one.
    if tail_bytes(entry) > uint32(MOST_TAIL):
        entry = uint32(RAW_TILE)
    return entry


def plane_count(staging, pitch, codec, counts, blocks, n_blocks, run):  # type: ignore[no-untyped-def]
    """The table of every record, into ``counts``. Parameters as of :func:`plane_encode`; ``staging`` is not touched."""
    lane = uint32(cuda.threadIdx.x & 31)
    warp = uniform(uint32((cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) >> 5))
    warps = uint32((cuda.gridDim.x * cuda.blockDim.x) >> 5)
    tiles = uint32(uint32(codec[N_PLANES]) * uint32(codec[GROUPS]) * uint32(codec[ACROSS]))
    at = warp
    while at < uint32(uint32(n_blocks) * tiles):
        b = uint32(at // tiles)
        tile = uint32(at - b * tiles)
        entry = count_tile(codec, tile, blocks[b], lane)
        if lane == uint32(0):
            store4(counts + uint64(4) * uint64(at), entry)
        at = uint32(at + warps)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _late(below):  # type: ignore[no-untyped-def]
    """Code of the second tier."""
    late = uint32(below - uint32(3))
    if late > uint32(7):
        late = uint32(7)
    if below == uint32(0):
        late = uint32(0)
    return late


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _row(word, low_base, high_base, lane, n, codes, escaped):  # type: ignore[no-untyped-def]
    """Tiers of a row: this lane's plane word (lanes 0 to 3), and how many codes there are now.

    Codes of the second tier, and exponents, are appended to shared memory, even channels before odd ones.
    """
    lower = uint32((uint32(1) << lane) - uint32(1))
    low_exponent = uint32((word >> uint32(7)) & uint32(255))
    high_exponent = uint32((word >> uint32(23)) & uint32(255))
    low_below = uint32(low_base - low_exponent)
    high_below = uint32(high_base - high_exponent)
    low = min(uint32(low_below - uint32(1)), uint32(3))
    high = min(uint32(high_below - uint32(1)), uint32(3))
    p = uint32(cuda.ballot_sync(ALL, (low & uint32(1)) != uint32(0)))
    q = uint32(cuda.ballot_sync(ALL, low >= uint32(2)))
    r = uint32(cuda.ballot_sync(ALL, (high & uint32(1)) != uint32(0)))
    s = uint32(cuda.ballot_sync(ALL, high >= uint32(2)))
    mask = uint32(p & q)
    if low == uint32(3):
        k = uint32(n + uint32(cuda.popc(uint32(mask & lower))))
        codes[k] = uint8(_late(low_below))
        escaped[k] = uint8(low_exponent)
    n = uint32(n + uint32(cuda.popc(mask)))
    mask = uint32(r & s)
    if high == uint32(3):
        k = uint32(n + uint32(cuda.popc(uint32(mask & lower))))
        codes[k] = uint8(_late(high_below))
        escaped[k] = uint8(high_exponent)
    n = uint32(n + uint32(cuda.popc(mask)))
    which = uint32(lane & uint32(3))
    own = p
    if which == uint32(1):
        own = q
    if which == uint32(2):
        own = r
    if which == uint32(3):
        own = s
    return own, n


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _signs(word):  # type: ignore[no-untyped-def]
    """Sign and mantissa of two values, a byte each."""
    low = (word >> uint32(8)) & uint32(0x80) | word & uint32(0x7F)
    return uint32(low | (word >> uint32(16)) & uint32(0x8000) | (word >> uint32(8)) & uint32(0x7F00))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _fixed_part(fixed, source, step, pair, lane, codes, escaped):  # type: ignore[no-untyped-def]
    """Writes a tile's fixed part, and its codes to shared memory; two rows at a time, since a lane stores a word."""
    low_base = uint32(pair & uint32(255))
    high_base = uint32(pair >> uint32(8))
    odd = uint32(lane & uint32(1))
    n = uint32(0)
    row = uint32(0)
    kept = uint32(0)
    while row < uint32(ROWS):
        first = uint32(load4(source))
        second = uint32(load4(source + step))
        source += step + step
        own, n = _row(first, low_base, high_base, lane, n, codes, escaped)
        if lane >> uint32(2) == row & uint32(7):
            kept = own
        own, n = _row(second, low_base, high_base, lane, n, codes, escaped)
        if lane >> uint32(2) == row + uint32(1) & uint32(7):
            kept = own
        if row & uint32(7) == uint32(6):  # of eight rows each lane has a word now
            store4(fixed + uint64(16) * uint64(row - uint32(6)) + uint64(4) * uint64(lane), kept)
        # An even lane stores for the first row, an odd one for the second: each gives what the other needs.
        mine, theirs = _signs(first), _signs(second)
        given = theirs if odd == uint32(0) else mine
        got = uint32(cuda.shfl_xor_sync(ALL, int32(given), 1))
        word = uint32(mine | got << uint32(16)) if odd == uint32(0) else uint32(got | theirs << uint32(16))
        line = uint64(64) * uint64(row + odd) + uint64(4) * uint64(lane >> uint32(1))
        store4(fixed + uint64(SIGN_AT) + line, word)
        row = uint32(row + uint32(2))
    return n


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _tail(tail, n, lane, codes, escaped):  # type: ignore[no-untyped-def]
    """Writes a tile's tail from shared memory."""
    lower = uint32((uint32(1) << lane) - uint32(1))
    groups = uint32((n + uint32(31)) >> uint32(5))
    escapes = uint32(0)
    group = uint32(0)
    while group < groups:
        k = uint32(uint32(32) * group + lane)
        code = uint32(0)
        if k < n:
            code = uint32(codes[k])
        p = uint32(cuda.ballot_sync(ALL, (code & uint32(1)) != uint32(0)))
        q = uint32(cuda.ballot_sync(ALL, (code & uint32(2)) != uint32(0)))
        r = uint32(cuda.ballot_sync(ALL, (code & uint32(4)) != uint32(0)))
        own = p
        if lane == uint32(1):
            own = q
        if lane == uint32(2):
            own = r
        if lane < uint32(3):
            store4(tail + uint64(12) * uint64(group) + uint64(4) * uint64(lane), own)
        mask = uint32(p & q & r)
        if code == uint32(7):  # a place that was read already: there are no more escapes than codes
            codes[uint32(escapes + uint32(cuda.popc(uint32(mask & lower))))] = escaped[k]
        escapes = uint32(escapes + uint32(cuda.popc(mask)))
        cuda.syncwarp()
        group = uint32(group + uint32(1))
    at = lane
    while uint32(4) * at < escapes:
        word = uint32(0)
        byte = uint32(0)
        while byte < uint32(4):  # what lies behind the last one in shared memory must not show
            k = uint32(uint32(4) * at + byte)
            if k < escapes:
                word = uint32(word | uint32(codes[k]) << (uint32(8) * byte))
            byte = uint32(byte + uint32(1))
        store4(tail + uint64(12) * uint64(groups) + uint64(4) * uint64(at), word)
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


def plane_encode(staging, pitch, codec, counts, blocks, n_blocks, run):  # type: ignore[no-untyped-def]
    """Codes pages into staging.

    Parameters
    ----------
    staging : uint64
        Address of the staging buffer, a multiple of 16; record ``b`` starts at ``staging + b * pitch``.
    pitch : uint64
        Room of a record, and bytes from one to the next: a multiple of 16. Of a record that needs more only the header
        is written, which says how much.
    codec : pointer to uint64
        See :mod:`kvortex.kernels.plane`.
    counts : uint64
        Address of (n_blocks, tiles) uint32 in VRAM, filled by :func:`plane_count` with the same blocks.
    blocks : pointer to int32, (n_blocks,)
        Page of each record; device memory, or mapped host memory.
    n_blocks : int32
    run : int32
        Tiles that a warp takes at a time, at least 1.
    """
    all_codes = cuda.shared.array((WARPS, VALUES), types.uint8)
    all_escaped = cuda.shared.array((WARPS, VALUES), types.uint8)
    codes = all_codes[cuda.threadIdx.x >> 5]
    escaped = all_escaped[cuda.threadIdx.x >> 5]
    lane = uint32(cuda.threadIdx.x & 31)
    warp = uniform(uint32((cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) >> 5))
    warps = uint32((cuda.gridDim.x * cuda.blockDim.x) >> 5)
    tiles = uint32(uint32(codec[N_PLANES]) * uint32(codec[GROUPS]) * uint32(codec[ACROSS]))
    runs = uint32((tiles + uint32(run) - uint32(1)) // uint32(run))
    table_words = uint32(codec[TABLE_WORDS])
    fixed_bytes = uint32(uint32(4 * HEADER_WORDS) + uint32(4) * table_words + uint32(FIXED_BYTES) * tiles)
    verbatim_bytes = uint32(uint32(4 * HEADER_WORDS) + uint32(2 * VALUES) * tiles)
    at = warp
    while at < uint32(uint32(n_blocks) * runs):
        b = uint32(at // runs)
        tile = uint32((at - b * runs) * uint32(run))
        last = min(uint32(tile + uint32(run)), tiles)
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
        if tile == uint32(0):
            write_header(record, codec[HEADER], stored, used, lane)
            if stored == uint32(CODED) and lane < uint32(table_words - tiles):
                store4(record + uint64(4 * HEADER_WORDS) + uint64(4) * uint64(tiles + lane), uint32(0))
        if stored == uint32(DECLINED):
            tile = last
        tail = record + uint64(fixed_bytes) + uint64(before)
        fixed = record + uint64(4 * HEADER_WORDS) + uint64(4) * uint64(table_words) + uint64(FIXED_BYTES) * uint64(tile)
        while tile < last:
            entry = uniform(uint32(load4(table + uint64(4) * uint64(tile))))
            source, step, base = place(codec, tile, blocks[b], lane)
            if stored == uint32(VERBATIM):
                target = record + verbatim_at(codec, tile) + uint64(4) * uint64(lane)
                row = uint32(0)
                while row < uint32(ROWS):
                    store4(target + uint64(row) * step, load4(source + uint64(row) * step))
                    row = uint32(row + uint32(1))
            else:
                if lane == uint32(0):
                    store4(record + uint64(4 * HEADER_WORDS) + uint64(4) * uint64(tile), entry)
                if entry == uint32(RAW_TILE):
                    row = uint32(0)
                    while row < uint32(ROWS):
                        begin = fixed + uint64(128) * uint64(row)
                        if row >= uint32(RAW_ROWS):
                            begin = tail + uint64(128) * uint64(row - uint32(RAW_ROWS))
                        store4(begin + uint64(4) * uint64(lane), load4(source + uint64(row) * step))
                        row = uint32(row + uint32(1))
                else:
                    n = _fixed_part(fixed, source, step, uint32(load2(base)), lane, codes, escaped)
                    cuda.syncwarp()
                    _tail(tail, n, lane, codes, escaped)
                    cuda.syncwarp()
            tail += uint64(tail_bytes(entry))
            fixed += uint64(FIXED_BYTES)
            tile = uint32(tile + uint32(1))
        at = uint32(at + warps)
