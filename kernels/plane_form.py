"""The plane code: a tile in numbers, for the kernels and for the host.

A tile is 16 tokens of 64 neighbouring channels of bf16. Of a value with exponent e in a channel of base b, ``o = b - e``:

- first tier, 2 bits: ``o`` = 1, 2, 3 is coded as 0, 1, 2; anything else as 3;
- second tier, 3 bits more where the first is 3: ``o`` = 0 is 0; 4 to 9 are 1 to 6; anything else is 7;
- third tier, where the second is 7: the exponent, a byte;
- sign and mantissa, a byte, as they are.

A coded record: header (64 bytes); a table of 32 bits for each tile, filled with zeros to 16 bytes; the fixed parts of all
tiles; their tails, in the order of tiles (by plane, by 16 tokens, by 64 channels).

| where in a tile | what |
|---|---|
| fixed, 0 | first tier, u32[16][4]: of each row the low bits of the even channels, their high bits, and those of the odd ones |
| fixed, 256 | sign and mantissa, u8[16][64] |
| tail, 0 | second tier, u32[groups of 32 codes][3]: bits 0, 1, 2. By rows, in a row even channels first; filled with 0 |
| tail, behind | escaped exponents in the same order, u8, filled with zeros to 4 bytes |

A tile's entry in the table: values of the second tier, and of the third in the upper half. A tile that would need as much as
it has is kept as it is, its 16 rows of 128 bytes through fixed part and tail, and its entry is ``RAW_TILE``.
"""

from __future__ import annotations

ROWS, CHANNELS = 16, 64
VALUES = ROWS * CHANNELS
TILE_BYTES = 2 * VALUES
TIER1_WORDS = 4 * ROWS
SIGN_AT = 4 * TIER1_WORDS  # in bytes
FIXED_WORDS = TIER1_WORDS + VALUES // 4
FIXED_BYTES = 4 * FIXED_WORDS
RAW_TAIL = TILE_BYTES - FIXED_BYTES
MOST_TAIL = RAW_TAIL - 4  # of a tile that is coded
RAW_ROWS = FIXED_BYTES // (2 * CHANNELS)  # rows of a raw tile in its fixed part
RAW_TILE = 0xFFFFFFFF

WARPS, ENCODE_WARPS = 8, 4  # of a CTA at most, and of one that codes
# Cells of the kernels' ``codec``: addresses of (planes, channels) uint8 bases and of a 64-byte header, then planes, groups of
# 16 tokens in a plane, tiles side by side, words of the table with its fill; from PLANES on, a plane's address in block 0 and
# its block stride by turns.
BASES, HEADER, N_PLANES, GROUPS, ACROSS, TABLE_WORDS, PLANES = 0, 1, 2, 3, 4, 5, 8
STORED_AT, USED_AT, HEADER_WORDS = 2, 6, 16  # words of a header
CODED, VERBATIM, DECLINED = 0, 1, 3  # as in kvortex.codecs.base
