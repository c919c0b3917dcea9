"""Lossless bf16: exponents as short codes in a window below one calibrated byte a channel, escapes, no entropy coder.

Every bit pattern comes back: NaN payloads, infinities, denormals, zeros. All that is gained is in the exponents, since
mantissas are noise (docs/codecs.md). The form is in :mod:`kvortex.kernels.plane_form`.
"""

from __future__ import annotations

import numpy as np

from kvortex.codecs._plane import decode_plane, encode_plane
from kvortex.codecs.base import HEADER_BYTES, Bytes, Codec, Flags, Int64s, as_rows
from kvortex.codecs.shape import RecordShape
from kvortex.codecs.tables import Tables
from kvortex.errors import CodecError, shown
from kvortex.kernels.plane_form import CHANNELS, FIXED_BYTES, ROWS

BUDGET = 0.72  # of the original: above the worst record of every text and model that was looked at
# A slot of what the sample's longest record and so much of the original take, if that is less. Of texts beside the sample, and
# of first blocks, which are not in it, the longest were 0.015 of the original above the sample's longest (docs/codecs.md).
MARGIN = 0.02
_STEP = 4096  # of pools' slots


class PlaneCodec(Codec):
    """See the module.

    Parameters
    ----------
    shape
        Of bf16 records, with a multiple of 16 tokens and of 64 channels in a plane.
    tables
        For as many planes and channels.
    budget
        What a slot reserves, as a part of the original: above 0, at most 1. It changes no record. None for what the tables'
        ``longest`` says, with :data:`MARGIN`, and at most :data:`BUDGET`.

    Raises
    ------
    CodecError
        The code does not fit these records, or the tables do not; store them raw.
    """

    name, number, exact = "plane", 1, True
    version = 2

    def __init__(self, shape: RecordShape, tables: Tables, *, budget: float | None = None) -> None:
        check_tables(shape, tables)
        if shape.dtype != "bfloat16" or shape.tokens % ROWS or shape.channels % CHANNELS:
            raise CodecError(f"plane codes bfloat16 in planes of {ROWS} tokens by {CHANNELS} channels and their multiples; "
                             f"seen: {shape.dtype}, {shape.tokens} tokens by {shape.channels} channels. Use codec raw.")
        reserved = BUDGET if budget is None else budget
        if isinstance(reserved, bool) or not isinstance(reserved, (int, float)) or not 0 < reserved <= 1:
            raise CodecError(f"budget = {shown(budget)}: must be above 0 and at most 1")
        self.shape, self.tables = shape, tables
        self.worst_bytes = HEADER_BYTES + shape.raw_bytes
        self.slot_bytes = min(self.worst_bytes, max(HEADER_BYTES, int(shape.raw_bytes * reserved) & ~15))
        if budget is None and tables.longest:
            wanted = -(-(tables.longest + int(MARGIN * shape.raw_bytes)) // _STEP) * _STEP
            self.slot_bytes = min(self.slot_bytes, wanted)
        groups, across = shape.tokens // ROWS, shape.channels // CHANNELS
        tiles = shape.planes * groups * across
        self.form = np.array([groups, across, -(-tiles // 4) * 4], np.int64)
        self.tiles = tiles
        self.fixed_bytes = HEADER_BYTES + 4 * int(self.form[2]) + tiles * FIXED_BYTES

    def parameters(self) -> bytes:
        return self.tables.digest

    def encode_into(self, records: Bytes, out: Bytes, first: Flags | None = None) -> Int64s:
        words, room = as_rows(records, self.shape.raw_bytes, "records"), as_rows(out, None, "out")
        if len(room) != len(words) or out.shape[1] < HEADER_BYTES:
            raise CodecError(f"out is {out.shape}, too small for {records.shape}")
        sizes = np.empty(len(words), np.int64)
        encode_plane(words.view(np.uint16), room, self.header.view(np.uint32), self.tables.base, self.form, sizes)
        return sizes

    def decode_into(self, coded: Bytes, out: Bytes) -> Flags:
        words, room = as_rows(coded, None, "coded"), as_rows(out, self.shape.raw_bytes, "out")
        if len(room) != len(words):
            raise CodecError(f"coded is {coded.shape}, and out {out.shape}")
        good = np.empty(len(words), np.bool_)
        header = self.header.view(np.uint32)
        decode_plane(words, room.view(np.uint16), header, self.tables.base, self.form, good)
        return good


def check_tables(shape: RecordShape, tables: Tables) -> None:
    """Refuses tables of other records."""
    if not isinstance(tables, Tables) or tables.base.shape != (shape.planes, shape.channels):
        seen = tables.base.shape if isinstance(tables, Tables) else shown(tables)
        raise CodecError(f"these records need tables of {(shape.planes, shape.channels)} planes and channels; seen: {seen}. "
                         "Calibrate with a sample of this model's records.")
