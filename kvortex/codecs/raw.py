"""No codec: a record is what lies in the pages."""

from __future__ import annotations

import numpy as np

from kvortex.codecs.base import Bytes, Codec, Flags, Int64s, as_rows
from kvortex.codecs.shape import RecordShape
from kvortex.errors import CodecError


class RawCodec(Codec):
    """Copies; no header, and an empty digest, so a namespace is what it is without a codec."""

    name, number, exact = "raw", 0, True
    digest = b""

    def __init__(self, shape: RecordShape) -> None:
        self.shape = shape
        self.worst_bytes = self.slot_bytes = shape.raw_bytes

    def encode_into(self, records: Bytes, out: Bytes, first: Flags | None = None) -> Int64s:
        as_rows(records, self.shape.raw_bytes, "records")
        as_rows(out, None, "out")
        if out.shape[1] < self.shape.raw_bytes or len(out) != len(records):
            raise CodecError(f"out is {out.shape}, too small for {records.shape}")
        out[:, : self.shape.raw_bytes] = records
        return np.full(len(records), self.shape.raw_bytes, np.int64)

    def decode_into(self, coded: Bytes, out: Bytes) -> Flags:
        as_rows(coded, None, "coded")
        as_rows(out, self.shape.raw_bytes, "out")
        if coded.shape[1] < self.shape.raw_bytes or len(out) != len(coded):
            raise CodecError(f"coded is {coded.shape}, too small for {out.shape}")
        out[:] = coded[:, : self.shape.raw_bytes]
        return np.ones(len(coded), np.bool_)

    def refusal(self, coded: Bytes) -> str | None:
        return None if coded.size == self.shape.raw_bytes else f"{coded.size} bytes are not {self.shape.raw_bytes}"
