"""What the kernels of bounded loss are told of a codec, in numbers that need no compiler to import.

What a record's bytes are is in :mod:`kvortex.codecs.lossy` and :mod:`kvortex.codecs._lossy`.
"""

from __future__ import annotations

TILE_BYTES = 2048
HEADER_BYTES = 64
# Cells of ``codec``: addresses of (planes, channels) means in bf16 and of two headers, of a coded record and of a part;
# planes, groups of 16 tokens in a plane, columns of 64 channels, planes of one layer's K, bits of K, bits of V, lanes that a
# head lies in, the bits of what rotated values of V count, or 0, bytes of a coded plane of K, of one of V, and of all, and the
# bits of what values count that are rotated back, or 0; from PLANES on, a plane's address in block 0 and its block stride by
# turns.
(MEANS, HEADERS, N_PLANES, GROUPS, ACROSS, EACH, K_BITS, V_BITS, LANES, FACTOR, KEY_BYTES, VALUE_BYTES, BODY_BYTES,
 BACK) = range(14)  # fmt: skip
PLANES = 16
STORED_AT, PART_AT, USED_AT, HEADER_WORDS = 2, 3, 6, 16  # words of a header
DECLINED = 3  # as in kvortex.codecs.base
LARGEST_SCALE = 0x4F5744FD  # the bits of 2**31.75
