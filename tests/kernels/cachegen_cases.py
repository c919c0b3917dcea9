"""Pages for the kernels of ``cachegen``: what models make, and what they never would."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvortex.codecs import RecordShape, calibrate, make_codec
from kvortex.codecs.base import DECLINED, HEADER_BYTES
from kvortex.codecs.cachegen import CacheGenCodec
from tests.kernels.plane_cases import GUARD, PlaneCase, Words

__all__ = ["CASES", "GUARD", "CacheGenCase", "damages", "escaping"]


def bf16(numbers: npt.NDArray[np.float64]) -> Words:
    """Rounded towards zero."""
    return (numbers.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


@dataclass
class CacheGenCase(PlaneCase):
    """As of ``plane``; ``room`` is a part of the original, and too small for what is kept exactly."""

    room: float | None = 0.6
    level: int = 1
    per: int = 1  # planes of a stream
    sample: int = 128  # pages that tables are learnt from
    cachegen: CacheGenCodec = field(init=False)

    def __post_init__(self) -> None:
        rng, shape = np.random.default_rng(5), self.shape
        size = shape.planes, shape.tokens, shape.channels
        spread = np.exp2(rng.normal(size=(shape.planes, 1, shape.channels)))
        middle = 4 * rng.normal(size=(shape.planes, 1, shape.channels))
        sample = np.stack([bf16(rng.normal(size=size) * spread + middle) for _ in range(self.sample)])
        tables = calibrate(sample.reshape(self.sample, -1).view(np.uint8), shape)
        codec = make_codec("cachegen", shape, tables, level=self.level)
        assert isinstance(codec, CacheGenCodec)
        codec._form[:] = self.per  # before anybody asks for the digest
        self.codec = self.cachegen = codec  # type: ignore[assignment]
        pages = list(sample[: self.pages])
        if self.hostile:
            few = np.where(rng.random(size) < 0.02, 40.0, 1.0)
            pages += [bf16(rng.normal(size=size) * spread * times + middle) for times in (few, 8.0, 3000.0)]
            pages.append(np.zeros(size, np.uint16))
            lone = sample[self.pages].copy()
            lone[-1, 3, 5] = 0x7FC1  # a NaN
            pages.append(lone)
        self.memory = np.stack(pages, 1)
        self.blocks = rng.permutation(len(pages)).astype(np.int32)

    def pages_of(self, records: npt.NDArray[np.uint8]) -> Words:
        """(n, raw_bytes) as (planes, n, tokens, channels)."""
        planes, _, tokens, channels = self.memory.shape
        return records.view(np.uint16).reshape(len(records), planes, tokens, channels).swapaxes(0, 1)

    @property
    def streams(self) -> int:
        """Of a record."""
        return self.cachegen.streams


def escaping(case: CacheGenCase) -> tuple[npt.NDArray[np.uint8], int]:
    """A good record, (pitch,), and its size: the first of the hostile ones, whose streams have escapes."""
    room = np.zeros((1, case.pitch), np.uint8)
    (size,) = case.codec.encode_into(case.records()[case.blocks == case.pages], room)
    counts = room[0, HEADER_BYTES : HEADER_BYTES + 8 * case.streams].view(np.uint32).reshape(-1, 2)
    assert size > 0 and (counts > 2).all()
    return room[0], int(size)


def damages(case: CacheGenCase) -> dict[str, npt.NDArray[np.uint8]]:
    """A good record damaged each time in another way, (pitch,)."""
    record, size = escaping(case)
    begin = HEADER_BYTES + 8 * case.streams
    made: dict[str, npt.NDArray[np.uint8]] = {}

    def damaged(what: str, at: int, number: int, width: str = "<u4") -> None:
        made[what] = record.copy()
        made[what][at : at + np.dtype(width).itemsize] = np.array([number], width).view(np.uint8)

    words, escapes = record[HEADER_BYTES : HEADER_BYTES + 8].view(np.uint32).tolist()
    damaged("another digest", 40, int(record[40]) ^ 1, "u1")
    damaged("declined", 8, DECLINED)
    damaged("a length of nothing", 24, 0, "<u8")
    damaged("a length beyond the room", 24, record.size + 4, "<u8")
    damaged("a length in its upper half", 24, size + (1 << 32), "<u8")
    damaged("a length that is not whole", 24, size + 1, "<u8")
    damaged("a word less", HEADER_BYTES, words - 1)
    damaged("two words less", HEADER_BYTES, words - 2)
    damaged("two words more", HEADER_BYTES, words + 2)
    damaged("many words", HEADER_BYTES, 0xFFFFFFFF)
    damaged("two escapes less", HEADER_BYTES + 4, escapes - 2)
    damaged("many escapes", HEADER_BYTES + 4, 0x80000000)
    damaged("a state of nothing", begin, 0)
    damaged("the largest state", begin + 4 * 31, 0xFFFFFFFF)
    # Two streams' counts lie, and the length is right.
    made["counts of each other"] = record.copy()
    counts = made["counts of each other"][HEADER_BYTES:begin].view(np.uint32).reshape(-1, 2)
    counts[0, 0] -= 2
    counts[-1, 1] += 2
    # Of the last stream: escapes that nobody asks for, and a last word that leaves a coder where none began.
    more = "more escapes, and a length that fits"
    damaged(more, 24, size + 4, "<u8")
    made[more][HEADER_BYTES:begin].view(np.uint32)[-1] += 2
    last_words, last_escapes = record[HEADER_BYTES:begin].view(np.uint32)[-2:].tolist()
    at = size - 4 * ((last_escapes + 1) // 2) - 4 * ((last_words + 1) // 2) + 2 * (last_words - 1)
    damaged("another last word", at, int(record[at]) ^ 1, "u1")
    # All words are others: whatever decoders do, they stay in their stream.
    for what, fill in (("words of ones", 0xFF), ("words of zeros", 0)):
        made[what] = record.copy()
        made[what][begin + 128 : size] = fill
    return made


CASES = [
    CacheGenCase("two streams, hostile pages", RecordShape(1, 1, 64), 0, hostile=True),
    CacheGenCase("a last stream that is shorter, coarse", RecordShape(3, 1, 64, parts="L"), 1, level=2, per=2),
    CacheGenCase("32 tokens, fine, one stream", RecordShape(1, 1, 64, tokens=32, parts="L"), 1, level=0, per=2),
]
