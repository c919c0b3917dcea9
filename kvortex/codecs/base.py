"""The contract of codecs: what a record becomes on its way to slower memory, and back.

A coded record begins with a header of 64 bytes, little-endian: magic, number and version of the codec, how the body is
stored, length of the original and of the coded record, and the codec's digest, which names the codec, its version, its
parameters, the shape of records and the tables. What was coded under another digest is never decoded. The bytes themselves
are guarded by whoever keeps the record, as those of any record are (:mod:`kvortex.digests`, the header of
:mod:`kvortex.tiers.record`); a decoder checks only what it is led by, so that damaged bytes cannot lead it astray.

A record of the codec ``raw`` is the original, without a header.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvortex.codecs.shape import RecordShape
from kvortex.errors import CodecError

MAGIC = int.from_bytes(b"KVXC", "little")
HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("codec", "<u2"),
        ("version", "<u2"),
        ("stored", "<u4"),
        ("part", "<u4"),
        ("raw_bytes", "<u8"),
        ("used_bytes", "<u8"),
        ("digest", "u1", 32),
    ]
)
HEADER_BYTES = HEADER.itemsize
# How the body is stored.
CODED, VERBATIM, EXACT, DECLINED = 0, 1, 2, 3
PART = 4  # some bytes of an original that takes several slots, as they are
Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]


class Codec(ABC):
    """Codes records of one shape; immutable, thread-safe, deterministic, and the same bytes on every machine.

    Attributes
    ----------
    name, number, version
        Of the codec; the number is what headers say.
    exact : bool
        Whether :meth:`decode` gives back every bit.
    shape : RecordShape
    worst_bytes : int
        No input makes a longer record: what buffers need where records may differ in length.
    slot_bytes : int
        What a slot reserves; a record that needs more is declined there. A multiple of 4, at most ``worst_bytes``.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    version: ClassVar[int] = 1
    exact: ClassVar[bool]
    shape: RecordShape
    worst_bytes: int
    slot_bytes: int

    def parameters(self) -> bytes:
        """What besides name, version and shape decides a record's bytes."""
        return b""

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ where records do; part of a namespace: ``Namespace(layout=layout.fingerprint + codec.digest)``.

        Empty for ``raw``, whose records are what they are without a codec.
        """
        digest = hashlib.sha256()
        for part in (b"kvortex-codec-1", self.name.encode(), b"%d" % self.version, self.shape.describe(), self.parameters()):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()

    @cached_property
    def header(self) -> npt.NDArray[np.void]:
        """(1,) HEADER of a record that is coded; ``used_bytes`` is 0."""
        made = np.zeros(1, HEADER)
        made["magic"], made["codec"], made["version"] = MAGIC, self.number, self.version
        made["raw_bytes"], made["digest"] = self.shape.raw_bytes, np.frombuffer(self.digest, np.uint8)
        return made

    @abstractmethod
    def encode_into(self, records: Bytes, out: Bytes, first: Flags | None = None) -> Int64s:
        """Codes a batch in one call without the GIL.

        Parameters
        ----------
        records : (n, raw_bytes) uint8
            Rows contiguous, at multiples of 4.
        out : (n, room) uint8
            Likewise; ``room`` is a multiple of 4. Bytes behind a record stay as they are.
        first : (n,) bool, optional
            Which records begin a sequence (its attention sinks): they come back bit by bit from every codec. None for
            none, and of no effect on exact codecs.

        Returns
        -------
        (n,) int64
            Bytes of each coded record, or the negative of what it would need where that is more than ``room``. Such a
            record's header says so, and what lies behind it means nothing.
        """

    @abstractmethod
    def decode_into(self, coded: Bytes, out: Bytes) -> Flags:
        """Decodes a batch in one call without the GIL.

        Parameters
        ----------
        coded : (n, room) uint8
            Rows contiguous, at multiples of 4. Bytes behind a record may be anything.
        out : (n, raw_bytes) uint8
            Likewise.

        Returns
        -------
        (n,) bool
            False where the bytes are no record of this codec: a miss. That row of ``out`` may have been overwritten.
        """

    def encode(self, record: Any, *, first: bool = False) -> bytes:
        """One record's fragments side by side, as bytes. Raises CodecError where it has another length."""
        data = np.frombuffer(record, np.uint8)
        if data.size != self.shape.raw_bytes:
            raise CodecError(f"{data.size} bytes are no record of {self.shape.raw_bytes}")
        out = np.zeros((1, self.worst_bytes), np.uint8)
        (size,) = self.encode_into(data[None], out, np.array([first]))
        return out[0, :size].tobytes()

    def decode(self, coded: Any) -> bytes:
        """The reverse; raises CodecError that says what is wrong, where these are no bytes that :meth:`encode` made."""
        data = np.frombuffer(coded, np.uint8)
        reason = self.refusal(data)
        if reason is None:
            padded = np.zeros((1, -(-data.size // 4) * 4), np.uint8)
            padded[0, : data.size] = data
            out = np.empty((1, self.shape.raw_bytes), np.uint8)
            if self.decode_into(padded, out)[0]:
                return out.tobytes()
            reason = "the body contradicts itself"
        raise CodecError(f"no record of {self.name}: {reason}")

    def refusal(self, coded: Bytes) -> str | None:
        """Why bytes are no record of this codec, as far as a header tells; None where they may be one."""
        if coded.size < HEADER_BYTES:
            return f"{coded.size} bytes are too few"
        seen, own = coded[:HEADER_BYTES].view(HEADER)[0], self.header[0]
        if seen["magic"] != MAGIC:
            return "it does not begin as one"
        if seen["codec"] != own["codec"] or seen["version"] != own["version"]:
            return f"it was written by codec {seen['codec']}, version {seen['version']}"
        foreign = (seen["digest"] != own["digest"]).any() or seen["raw_bytes"] != own["raw_bytes"]
        if foreign or (seen["part"] and seen["stored"] != PART):
            return "other parameters, tables or another shape were used"
        if seen["stored"] == PART:
            return f"it is part {seen['part']} of a record that was kept exactly"
        if seen["stored"] == DECLINED:
            return f"it needed {seen['used_bytes']} bytes and was declined"
        if seen["used_bytes"] != coded.size:
            return f"it has {coded.size} bytes, and says {seen['used_bytes']}"
        return None


def as_rows(array: Bytes, width: int | None, what: str) -> npt.NDArray[np.uint32]:
    """A batch as rows of 32-bit words, not copied; refuses what is none."""
    rows = array if isinstance(array, np.ndarray) else np.empty(0, np.uint8)
    if rows.ndim != 2 or rows.dtype != np.uint8 or (width is not None and rows.shape[1] != width):
        wanted = "room" if width is None else width
        raise CodecError(f"{what} must be (n, {wanted}) uint8; seen: {rows.dtype} {rows.shape}")
    if rows.shape[1] % 4 or rows.size and (rows.strides[1] != 1 or rows.strides[0] % 4 or rows.ctypes.data % 4):
        raise CodecError(f"{what} must have contiguous rows of whole 32-bit words, at multiples of 4; seen: {rows.shape} with "
                         f"strides {rows.strides}")
    return rows.view(np.uint32)
