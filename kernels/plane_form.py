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
| fixed, 0 | first tier, u32[2][32], a word for 8 rows of 2 channels: 16 bits of the even one, row by row, then of the odd |
| fixed, 256 | sign and mantissa, u8[2][32][8][2]: likewise, row by row |
| tail, 0 | second tier, 12 bytes for 32 codes: 32 bits for each of two sixteens, then 16 for each; filled with code 0 |
| tail, behind | escaped exponents, u8, in the order of nibbles; filled with zeros to 4 bytes |

The second tier has the order of the first one's words and bits. Of a sixteen each four codes 0, 1, 2, 3 are nibbles, from the
lowest on those of 0, 2, 1, 3. Two fours take the 32 bits and the third one the 16. The fourth takes their nibbles' upper bits:
its bits 0 those of the lower half of the 32, bits 1 those of the upper half, bits 2 those of the 16. So who has 8 rows of a
pair of channels, or a sixteen, has whole words of the record.

A tile's entry in the table: values of the second tier, and of the third in the upper half. A tile that would need as much as
it has is kept as it is, its 16 rows of 128 bytes through fixed part and tail, and its entry is ``RAW_TILE``.
"""

from __future__ import annotations

ROWS, CHANNELS = 16, 64
VALUES = ROWS * CHANNELS
TILE_BYTES = 2 * VALUES
TIER1_WORDS = VALUES // 16
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
