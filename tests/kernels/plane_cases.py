"""Pages for the plane kernels: what models make, and what they never would."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvortex import KVLayout
from kvortex.codecs import RecordShape, calibrate, make_codec
from kvortex.codecs.plane import PlaneCodec

GUARD = 64
Words = npt.NDArray[np.uint16]


def usual(rng: np.random.Generator, *size: int) -> Words:
    """Like attention's: channels with scales and offsets of their own."""
    numbers = rng.normal(size=size) * np.exp2(rng.integers(-6, 6, size[-1])) + rng.normal(size=size[-1])
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def hostile(rng: np.random.Generator, planes: int, tokens: int, channels: int) -> list[Words]:
    """Pages (planes, tokens, channels): one that stays raw, one of zeros, NaNs in a tile, and one tile that is kept raw."""
    size = planes, tokens, channels
    anything = rng.integers(0, 1 << 16, size).astype(np.uint16)
    nans = usual(rng, *size)
    nans[0, :16, :64] = 0x7F80 | rng.integers(0, 128, (16, 64)) | rng.integers(0, 2, (16, 64)) << 15
    wild = usual(rng, *size)
    wild[-1, :16, -64:] = anything[-1, :16, -64:]
    return [anything, np.zeros(size, np.uint16), nans, wild]


# Values of the second tier, and of the third among them, of two tiles a page: none, whole groups of 32, more than lanes have
# sixteens, all; with the longest tail that is coded and one that is longer.
EDGES = [((0, 0), (1024, 380)), ((32, 0), (1024, 381)), ((512, 3), (64, 64)), ((513, 100), (992, 7))]


def edges(rng: np.random.Generator, base: npt.NDArray[np.uint8]) -> list[Words]:
    """Pages (2, 16, 64) with as many values of each tier as :data:`EDGES` says, under (2, 64) bases."""
    pages = []
    for page in EDGES:
        below = rng.integers(1, 4, (2, 1024))  # of the first tier
        for tile, (second, third) in enumerate(page):
            places = rng.permutation(1024)[:second]
            below[tile, places] = rng.choice([0, 4, 5, 6, 7, 8, 9], second)
            below[tile, places[:third]] = rng.integers(10, 60, third)
        exponents = base.astype(np.int64)[:, None] - below.reshape(2, 16, 64)
        assert (0 <= exponents).all()
        pages.append((rng.integers(0, 1 << 16, (2, 16, 64)) & 0x807F | exponents << 7).astype(np.uint16))
    return pages


def change_code(record: npt.NDArray[np.uint8], at: int) -> None:
    """Of the first tier's words the code in the lowest bits of a byte: it is 3 afterwards, or no more."""
    record[at] ^= 3 ^ (record[at] & 3) or 1


@dataclass
class PlaneCase:
    """Pages of one tensor in an order of their own; ``room`` is a part of the original, None for as much as is ever needed."""

    name: str
    shape: RecordShape
    pages: int  # of the usual kind
    hostile: bool = False
    edges: bool = False
    room: float | None = None
    run: int = 2
    codec: PlaneCodec = field(init=False)
    memory: Words = field(init=False)
    blocks: npt.NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        rng, shape = np.random.default_rng(5), self.shape
        size = shape.planes, shape.tokens, shape.channels
        pages = [usual(rng, *size) for _ in range(self.pages)]
        sample = np.stack([usual(np.random.default_rng(5), *size)]).reshape(1, -1).view(np.uint8)
        codec = make_codec("plane", shape, calibrate(sample, shape))
        assert isinstance(codec, PlaneCodec)
        self.codec = codec
        pages += hostile(rng, *size) if self.hostile else []
        pages += edges(rng, codec.tables.base) if self.edges else []
        self.memory = np.stack(pages, 1)  # (planes, pages, tokens, channels): a page's planes lie apart
        self.blocks = rng.permutation(len(pages)).astype(np.int32)

    @property
    def pitch(self) -> int:
        """Bytes of a record's room."""
        room = self.codec.worst_bytes if self.room is None else int(self.room * self.shape.raw_bytes)
        return -(-room // 16) * 16

    @property
    def tiles(self) -> int:
        return self.codec.tiles

    def fragments(self, address: int, pages: int | None = None) -> npt.NDArray[np.int64]:
        """Of as many pages as there are, or another number, at an address."""
        planes, own, tokens, channels = self.memory.shape
        pages = own if pages is None else pages
        strides = tuple(2 * step for step in (pages * tokens * channels, tokens * channels, channels, 1))
        return KVLayout.from_pointers((address, (planes, pages, tokens, channels), strides, 2), 1, 0, device="host").fragments

    def records(self) -> npt.NDArray[np.uint8]:
        """(n, raw_bytes), in the order of ``blocks``."""
        return np.ascontiguousarray(self.memory[:, self.blocks].swapaxes(0, 1)).reshape(len(self.blocks), -1).view(np.uint8)

    def coded(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """What the host makes of them in this room, (n, pitch), and sizes."""
        out = np.zeros((len(self.blocks), self.pitch), np.uint8)
        sizes = self.codec.encode_into(self.records(), out)
        return out, sizes

    def wrong(self, staging: npt.NDArray[np.uint8]) -> int:
        """Bytes in which (n, pitch) of a GPU differ from the host's; of what was declined the header alone counts."""
        out, sizes = self.coded()
        ends = np.where(sizes < 0, 64, sizes)
        return sum(int((a[:end] != b[:end]).sum()) for a, b, end in zip(staging, out, ends, strict=True))


@dataclass
class Ranged:
    """What a launch over tiles ``first`` to ``end`` of coded records finds in staging: ``rows``, (n, pitch).

    ``spans`` are what launches digest: first and last byte, how much nearer to the begin these lie, and whether headers say
    how many there are.
    """

    first: int
    end: int
    rows: npt.NDArray[np.uint8]
    tails_from: int
    spans: list[tuple[int, int, int, int]]


def tail_size(entry: int) -> int:
    """Bytes of a tile's tail by its entry."""
    return 768 if entry == 0xFFFFFFFF else 12 * -(-(entry & 0xFFFF) // 32) + 4 * -(-(entry >> 16) // 4)


def ranged(codec: PlaneCodec, records: npt.NDArray[np.uint8], edges: list[int]) -> list[Ranged]:
    """Records (n, pitch) as launches over the ranges of tiles between ``edges`` find them."""
    n, tiles, head = len(records), codec.tiles, codec.fixed_bytes - 1280 * codec.tiles
    made, done = [], codec.fixed_bytes
    sizes = np.zeros((n, tiles), np.int64)
    for b, record in enumerate(records):
        for tile, entry in enumerate(record[64:][: 4 * tiles].view(np.uint32).tolist()):
            sizes[b, tile] = tail_size(entry)
    offsets = codec.fixed_bytes + np.concatenate((np.zeros((n, 1), np.int64), np.cumsum(sizes, axis=1)), axis=1)
    offsets = np.minimum(offsets, records.shape[1])
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        low, high = int(offsets[:, first].min()) // 16 * 16, -(-int(offsets[:, end].max()) // 16) * 16
        fixed = head + 1280 * first, head + 1280 * end
        rows = np.concatenate((records[:, :head], records[:, slice(*fixed)], records[:, low:high]), axis=1)
        spans = [(fixed[0] if first else 0, fixed[1], fixed[0] - head, 0), (done, high, low - head - fixed[1] + fixed[0], 1)]
        made.append(Ranged(first, end, rows, low, spans))
        done = high
    return made


CASES = [
    PlaneCase("two tiles, usual and hostile", RecordShape(1, 1, 64), 2, hostile=True),
    PlaneCase("tails of all lengths", RecordShape(1, 1, 64), 1, edges=True),
    PlaneCase("groups of tokens, tiles side by side", RecordShape(1, 2, 64, tokens=32, parts="L"), 1, run=3),
    PlaneCase("a room that hostile pages do not fit", RecordShape(1, 1, 64), 1, hostile=True, room=0.8),
    PlaneCase("a room for less than fixed parts", RecordShape(1, 1, 64), 1, hostile=True, room=0.5),
    PlaneCase("a room for headers alone", RecordShape(1, 1, 64), 1, room=64 / 4096),
]
