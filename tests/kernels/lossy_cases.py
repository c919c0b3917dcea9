"""Pages for the kernels of bounded loss: what models make, what they never would, and parts of a first block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvortex import KVLayout
from kvortex.codecs import RecordShape, calibrate, make_codec
from kvortex.codecs.base import DECLINED, HEADER
from kvortex.codecs.lossy import LossyCodec
from tests.kernels.plane_cases import GUARD, Words, usual

NAMES = ("int8", "k6v4", "k4v4", "k4v3")
FILL = 0x5A5A  # of pages that nothing was written to


def hostile(rng: np.random.Generator, codec: LossyCodec) -> list[Words]:
    """Pages (planes, tokens, channels), each with another kind of numbers that no model makes."""
    shape = codec.shape
    size = shape.planes, shape.tokens, shape.channels
    key, value = (shape.parts_of_planes.index(part) for part in "KV")
    pages = [np.full(size, pattern, np.uint16) for pattern in (0, 0x8000, 0x4040)]  # zeros of both signs
    signs = rng.integers(0, 2, size).astype(np.uint16) << np.uint16(15)
    pages.append(signs | rng.integers(0, 0x180, size).astype(np.uint16))  # subnormal, or nearly so
    pages.append(signs | rng.integers(0x2000, 0x4780, size).astype(np.uint16))  # all sizes up to 65,536
    page = np.repeat(codec.tables.mean[:, None], shape.tokens, 1)  # one number beside means, of any size that K may have
    page[key, 3] = rng.integers(0x2F00, 0x4F40, size[2]).astype(np.uint16)
    pages.append(page)
    outlier = usual(rng, *size)
    outlier[key, 5, 7], outlier[value, 5, 7] = 0x4F57, 0x477F  # as large as may be
    pages.append(outlier)
    for plane, pattern in ((key, 0x7FC1), (value, 0xFF81), (key, 0xFF80), (value, 0x7F80), (key, 0x4F58), (value, 0x4780)):
        page = usual(rng, *size)
        page[plane, -1, -1] = pattern
        pages.append(page)
    page = np.zeros(size, np.uint16)  # sums that are no numbers, beside others that are 0
    page[value, 2, :8] = [0x7F62, 0xFF62, 0x7F62, 0xFF62, 0x7F62, 0xFF62, 0xFF62, 0x7F62]
    return [*pages, page]


@dataclass
class LossyCase:
    """Pages of one tensor in an order of their own, and the parts of one of them."""

    codec_name: str
    shape: RecordShape
    pages: int = 2  # of the usual kind
    hostile: bool = True
    run: int = 3
    codec: LossyCodec = field(init=False)
    memory: Words = field(init=False)
    rows: npt.NDArray[np.int32] = field(init=False)  # (n, 2): page and part

    def __post_init__(self) -> None:
        rng, shape = np.random.default_rng(7), self.shape
        size = shape.planes, shape.tokens, shape.channels
        pages = [usual(np.random.default_rng((5, at)), *size) for at in range(self.pages)]
        sample = np.stack(pages[:4]).reshape(min(4, self.pages), -1).view(np.uint8)
        codec = make_codec(self.codec_name, shape, calibrate(sample, shape))
        assert isinstance(codec, LossyCodec)
        self.codec = codec
        pages += hostile(rng, codec) if self.hostile else []
        coded, parts = len(pages), np.arange(codec.parts)
        pages.append(rng.integers(0, 1 << 16, size).astype(np.uint16))
        self.memory = np.stack(pages, 1)  # (planes, pages, tokens, channels): a page's planes lie apart
        blocks = np.concatenate((rng.permutation(coded), np.full(len(parts), coded)))
        self.rows = np.stack((blocks, np.concatenate((np.full(coded, -1), parts))), 1).astype(np.int32)

    @property
    def name(self) -> str:
        shape = self.shape
        return f"{self.codec_name}, {shape.layers} x {shape.heads} x {shape.head_dim}, {shape.tokens} tokens, {shape.order}"

    @property
    def pitch(self) -> int:
        return self.codec.slot_bytes + 32

    def fragments(self, address: int) -> npt.NDArray[np.int64]:
        planes, pages, tokens, channels = self.memory.shape
        strides = tuple(2 * step for step in (pages * tokens * channels, tokens * channels, channels, 1))
        return KVLayout.from_pointers((address, (planes, pages, tokens, channels), strides, 2), 1, 0, device="host").fragments

    def records(self) -> npt.NDArray[np.uint8]:
        """(n, raw_bytes), in the order of rows."""
        return np.ascontiguousarray(self.memory[:, self.rows[:, 0]].swapaxes(0, 1)).reshape(len(self.rows), -1).view(np.uint8)

    def staging(self) -> npt.NDArray[np.uint8]:
        """(n, pitch): what the host makes of them; of what is declined the header alone means something."""
        codec, records = self.codec, self.records()
        made = np.zeros((len(records), self.pitch), np.uint8)
        coded = np.zeros((len(records), codec.slot_bytes), np.uint8)
        sizes = codec.encode_into(records, coded)
        for row, part in enumerate(self.rows[:, 1]):
            if part >= 0:
                own = records[row, part * codec.part_bytes :][: codec.part_bytes]
                header = codec.headers[1].copy()
                header[3], header[6] = part, 64 + len(own)
                coded[row] = 0
                coded[row, :64] = header.view(np.uint8)
                coded[row, 64 : 64 + len(own)] = own
            elif sizes[row] < 0:
                coded[row, :64].view(HEADER)["used_bytes"] = codec.worst_bytes
        made[:, : codec.slot_bytes] = coded
        return made

    def declined(self, staging: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """(n,) bool: by headers."""
        stored = np.ascontiguousarray(staging[:, :64]).view(HEADER)["stored"][:, 0]
        found: npt.NDArray[np.bool_] = stored == DECLINED
        return found

    def wrong(self, staging: npt.NDArray[np.uint8]) -> int:
        """Bytes in which (n, pitch) of a GPU differ from the host's, zeros behind records included."""
        mine = self.staging()
        differ = staging != mine
        differ[self.declined(mine), 64 : self.codec.slot_bytes] = False
        return int(differ.sum())

    def decoded(self, staging: npt.NDArray[np.uint8]) -> tuple[Words, npt.NDArray[np.bool_]]:
        """Pages after the host has decoded staging into pages of ``FILL``, and which rows it took."""
        codec, memory = self.codec, np.full_like(self.memory, FILL)
        own = np.ascontiguousarray(staging[:, : codec.slot_bytes])
        out = np.zeros((len(own), codec.shape.raw_bytes), np.uint8)
        good = codec.decode_into(own, out)
        planes = out.view(np.uint16).reshape(len(own), *self.memory.shape[:1], *self.memory.shape[2:])
        for row, (block, part) in enumerate(self.rows):
            if part >= 0:
                header = codec.headers[1].copy()
                header[3] = part
                header[6] = min(codec.slot_bytes, 64 + codec.shape.raw_bytes - part * codec.part_bytes)
                good[row] = (own[row, :64].view(np.uint32) == header).all()
            if good[row] and part >= 0:
                page = np.ascontiguousarray(memory[:, block])
                begin = part * codec.part_bytes
                page.reshape(-1).view(np.uint8)[begin : begin + header[6] - 64] = own[row, 64 : header[6]]
                memory[:, block] = page
            elif good[row]:
                memory[:, block] = planes[row]
        return memory, good


SMALL = [
    *(LossyCase(name, RecordShape(1, 1, 64)) for name in ("int8", "k4v3")),
    LossyCase("k4v4", RecordShape(1, 2, 64, tokens=32, order="HND"), 1, hostile=False),
    LossyCase("k6v4", RecordShape(1, 1, 128, tokens=32), 1, hostile=False, run=1),
    LossyCase("int8", RecordShape(1, 4, 32, tokens=32), 1, hostile=False),
]
_8B = RecordShape(2, 8, 128)  # layers of a model of 8 B
LARGE: list[Callable[[], LossyCase]] = [  # for a GPU
    *(functools.partial(LossyCase, name, RecordShape(1, 1, 64)) for name in NAMES),
    *(functools.partial(LossyCase, name, _8B) for name in NAMES),
    *(functools.partial(LossyCase, name, _8B, 192, hostile=False, run=4) for name in NAMES),
    functools.partial(LossyCase, "k4v4", RecordShape(1, 1, 1024, tokens=32)),
    functools.partial(LossyCase, "k4v3", RecordShape(2, 4, 256, order="HND"), run=1),
    functools.partial(LossyCase, "k6v4", RecordShape(2, 2, 32, tokens=48)),
]
__all__ = ["FILL", "GUARD", "LARGE", "NAMES", "SMALL", "LossyCase"]
