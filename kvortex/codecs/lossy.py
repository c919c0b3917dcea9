"""Bounded loss at a fixed rate: K by channel with scales that never clip, V by token, the first block of a sequence exact.

Of a K value: its channel's calibrated mean is taken off; of 16 tokens of a channel the largest that is left is rounded up
to a quarter power of two, a byte; codes are of equal steps between, mid-rise. Of V: a token's head is rotated by the
Hadamard matrix (where a codec says so), then coded between its least and its largest value, whose fp16 forms
are rounded outwards. What has a value that is not finite, or is too large for any scale, is stored exactly.

These forms, and no others, because the common ones ruin some models: K by token, K rotated, scales that clip, static
scales on attention sinks (docs/codecs.md says what was measured).
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvortex.codecs._lossy import GROUP, decode_lossy, encode_lossy, scales
from kvortex.codecs.base import CODED, DECLINED, EXACT, HEADER, HEADER_BYTES, PART, Bytes, Codec, Flags, Int64s, as_rows
from kvortex.codecs.plane import PlaneCodec
from kvortex.codecs.shape import RecordShape
from kvortex.codecs.tables import Tables
from kvortex.errors import CodecError

_SCALES = scales()


class BoundedCodec(Codec):
    """A codec with loss, whose records are bodies of its own or, where nothing may be lost, records of ``plane``."""

    exact = False
    _plane: PlaneCodec

    @abstractmethod
    def _encode_bodies(self, planes: npt.NDArray[np.uint16], room: npt.NDArray[np.uint32], coded: Flags) -> Int64s:
        """Codes the records that are ``coded``, which becomes False for those that only ``plane`` can keep; (n,) int64 bytes of
        each with its header. What needs more than ``room`` may be anything."""

    @abstractmethod
    def _decode_bodies(
        self, words: npt.NDArray[np.uint32], planes: npt.NDArray[np.uint16], used: Int64s, wanted: Flags
    ) -> None:
        """The reverse, for those that are ``wanted``, which becomes False for what is no body of so many bytes."""

    def encode_into(self, records: Bytes, out: Bytes, first: Flags | None = None) -> Int64s:
        words, room = as_rows(records, self.shape.raw_bytes, "records"), as_rows(out, None, "out")
        if len(room) != len(words) or out.shape[1] < HEADER_BYTES:
            raise CodecError(f"out is {out.shape}, too small for {records.shape}")
        coded = np.ones(len(words), np.bool_) if first is None else ~np.asarray(first, np.bool_)
        sizes = self._encode_bodies(self._planes(words), room, coded)
        made = np.repeat(self.header, len(words))
        made["stored"] = np.where(coded, CODED, EXACT)
        at = np.flatnonzero(~coded)
        if at.size:
            kept = np.empty((at.size, self._plane.worst_bytes), np.uint8)
            own = self._plane.encode_into(np.ascontiguousarray(records[at]), kept)
            sizes[at] = HEADER_BYTES + own
            for row, data, size in zip(at, kept, own, strict=True):
                if HEADER_BYTES + size <= out.shape[1]:
                    out[row, HEADER_BYTES : HEADER_BYTES + size] = data[:size]
        made["used_bytes"] = sizes
        declined = sizes > out.shape[1]
        made["stored"][declined] = DECLINED
        out[:, :HEADER_BYTES] = made.view(np.uint8).reshape(-1, HEADER_BYTES)
        return np.where(declined, -sizes, sizes)

    def decode_into(self, coded: Bytes, out: Bytes) -> Flags:
        words, target = as_rows(coded, None, "coded"), as_rows(out, self.shape.raw_bytes, "out")
        if len(target) != len(words):
            raise CodecError(f"coded is {coded.shape}, and out {out.shape}")
        if coded.shape[1] < HEADER_BYTES:
            return np.zeros(len(words), np.bool_)
        seen = np.ascontiguousarray(coded[:, :HEADER_BYTES]).view(HEADER)[:, 0]
        ours = np.ones(len(words), np.bool_)
        for name in ("magic", "codec", "version", "part", "raw_bytes"):
            ours &= seen[name] == self.header[name]
        ours &= (seen["digest"] == self.header["digest"]).all(1) & (seen["used_bytes"] <= coded.shape[1])
        good: Flags = ours & (seen["stored"] == CODED)
        if good.any():
            self._decode_bodies(words, self._planes(target), seen["used_bytes"].astype(np.int64), good)
        for row in np.flatnonzero(ours & (seen["stored"] == EXACT)):
            own = coded[row : row + 1, HEADER_BYTES : int(seen["used_bytes"][row])]
            whole = own.shape[1] % 4 == 0 and self._plane.refusal(own[0]) is None
            good[row] = whole and self._plane.decode_into(own, out[row : row + 1])[0]
        return good

    def _planes(self, words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
        shape = self.shape
        return words.view(np.uint16).reshape(len(words), shape.planes, shape.tokens, shape.channels)


class LossyCodec(BoundedCodec):
    """A codec of this family; see the module.

    Parameters
    ----------
    shape
        Of bf16 records of K and V, as :class:`~kvortex.codecs.plane.PlaneCodec` takes them.
    tables
        For as many planes and channels.

    Raises
    ------
    CodecError
        The code does not fit these records, or the tables do not.

    Notes
    -----
    What is stored exactly, a record of codec ``plane`` behind the header, needs more than ``slot_bytes``.

    Attributes
    ----------
    part_bytes, parts
        Bytes of an original that a slot takes behind a header, and slots that all of it takes: how a pool of such slots keeps
        the first block of a sequence.
    key_bytes, value_bytes
        Of a plane of K and of V in a body.
    tiles
        Of 16 tokens of 64 channels, in a record.
    turn : (2,) float32
        What rotated values count, and what those that are rotated back: powers of two, together 1 / ``head_dim``; 0 for no
        rotation.
    """

    version = 3
    k_bits: ClassVar[int]
    v_bits: ClassVar[int]
    rotated: ClassVar[bool]

    def __init__(self, shape: RecordShape, tables: Tables) -> None:
        self._plane = PlaneCodec(shape, tables, budget=1)
        if shape.parts != "KV":
            raise CodecError(f"parts = {shape.parts!r}: {self.name} codes K and V; what it does to a latent was never measured."
                             " Use codec plane.")
        if self.rotated and shape.head_dim & (shape.head_dim - 1):
            raise CodecError(f"head_dim = {shape.head_dim}: {self.name} rotates V, which takes a power of two. Use codec int8.")
        self.shape, self.tables = shape, tables
        tokens, channels = shape.tokens, shape.channels
        self.key_bytes = tokens // GROUP * channels + tokens * channels * self.k_bits // 8
        self.value_bytes = tokens * (channels // shape.head_dim) * 4 + tokens * channels * self.v_bits // 8
        self.slot_bytes = HEADER_BYTES + shape.planes // 2 * (self.key_bytes + self.value_bytes)
        self.worst_bytes = HEADER_BYTES + self._plane.worst_bytes
        self.tiles, self.part_bytes = self._plane.tiles, self.slot_bytes - HEADER_BYTES
        self.parts = -(-shape.raw_bytes // self.part_bytes)
        self._is_key = np.array([part == "K" for part in shape.parts_of_planes])
        self._form = np.array([shape.head_dim, self.k_bits, self.v_bits], np.int64)
        turns = shape.head_dim.bit_length() - 1 if self.rotated else 0
        forth = (turns + 1) // 2
        self.turn = np.array([2.0**-forth, 2.0 ** (forth - turns)] if self.rotated else [0, 0], np.float32)

    def parameters(self) -> bytes:
        return self.tables.digest

    @cached_property
    def headers(self) -> npt.NDArray[np.uint32]:
        """(2, 16): of a coded record in a slot, and of part 0 of one that is kept exactly, without its length."""
        made = np.repeat(self.header, 2)
        made["stored"], made["used_bytes"] = (CODED, PART), (self.slot_bytes, 0)
        return made.view(np.uint32).reshape(2, -1)

    @cached_property
    def compiled(self) -> tuple[Any, ...]:
        """What compiled functions take of a codec: see :func:`kvortex.codecs._lossy.encode_lossy`."""
        return self._is_key, self.tables.means, self._form, self.turn, _SCALES

    def _encode_bodies(self, planes: npt.NDArray[np.uint16], room: npt.NDArray[np.uint32], coded: Flags) -> Int64s:
        if 4 * room.shape[1] < self.slot_bytes:
            room = np.empty((len(planes), self.slot_bytes // 4), np.uint32)  # to find out what each would need
        body = room[:, HEADER_BYTES // 4 : self.slot_bytes // 4]
        encode_lossy(planes, body, *self.compiled, coded)
        return np.full(len(planes), self.slot_bytes, np.int64)

    def _decode_bodies(
        self, words: npt.NDArray[np.uint32], planes: npt.NDArray[np.uint16], used: Int64s, wanted: Flags
    ) -> None:
        wanted &= used == self.slot_bytes
        if wanted.any():
            body = words[:, HEADER_BYTES // 4 : self.slot_bytes // 4]
            decode_lossy(body, planes, *self.compiled, wanted)


class Int8Codec(LossyCodec):
    """8 bits: x1.88 at heads of 64."""

    name, number = "int8", 2
    k_bits, v_bits, rotated = 8, 8, False


class K6V4Codec(LossyCodec):
    """6 bits of K, 4 of V: x2.91 at heads of 64."""

    name, number = "k6v4", 3
    k_bits, v_bits, rotated = 6, 4, True


class K4V4Codec(LossyCodec):
    """4 bits of K, 4 of V: x3.55 at heads of 64."""

    name, number = "k4v4", 4
    k_bits, v_bits, rotated = 4, 4, True


class K4V3Codec(LossyCodec):
    """4 bits of K, 3 of V: x4.0 at heads of 64."""

    name, number = "k4v3", 5
    k_bits, v_bits, rotated = 4, 3, True
