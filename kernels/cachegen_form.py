"""What kernels of codec ``cachegen`` and the host agree on; :mod:`kvortex.codecs._ranges` has the form of a record."""

from __future__ import annotations

# Cells of ``codec`` behind those of the planes: addresses of uint8 tables of channels (planes, channels), of float32 means
# (planes, channels) and steps (planes,), and of the tables; how many tables, the largest power of two that is a symbol, planes
# of a stream, streams, values of a stream, bytes of the longest record.
KINDS, MEANS, STEPS, TABLES, N_TABLES, TOP, STREAM_PLANES, STREAMS, MOST, WORST, CELLS = range(11)
ROW, MOST_AT = 258, 257  # halves of a table: where each symbol's share of 2**14 begins; behind, the most steps with a symbol
MOST_TABLES = 82
HALVES = MOST_TABLES * ROW  # of all tables, in shared memory
PROBABILITY_BITS, LEAST_STATE, LANES = 14, 1 << 16, 32  # as in kvortex.codecs._ranges
