"""Small problems for the gather and scatter kernels, with an obvious reference: bytes copied one fragment at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvortex.digests.keys import columns, rows
from kvortex.transfer.plan import split_pieces
from tests.naive_digest import sums

GUARD = 64  # bytes on each side of everything, which no kernel may change
Bytes = npt.NDArray[np.uint8]


def numbers(nbytes: int) -> npt.NDArray[np.uint64]:
    """The table that kernels read, for records of so many bytes."""
    return np.concatenate((columns().T.ravel(), rows(nbytes).ravel()))


@dataclass
class Case:
    """Pages in one stretch of memory: ``starts`` and ``sizes`` of fragments in block 0, ``stride`` from block to block."""

    name: str
    starts: list[int]
    sizes: list[int]
    stride: int
    blocks: list[int]
    pad: int = 0  # bytes between records in staging
    piece_bytes: int = 4096
    first: int = 0  # pieces left out at the start of the record

    @property
    def memory_bytes(self) -> int:
        return 2 * GUARD + max(self.starts) + max(self.sizes) + self.stride * max(self.blocks)

    @property
    def fragments(self) -> npt.NDArray[np.int64]:
        offsets = np.cumsum([0, *self.sizes[:-1]])
        rows = [[GUARD + s, self.stride, o, n] for s, o, n in zip(self.starts, offsets, self.sizes, strict=True)]
        return np.array(rows, np.int64)

    @property
    def pieces(self) -> npt.NDArray[np.int64]:
        """With addresses relative to the memory's start."""
        return split_pieces(self.fragments, self.piece_bytes)[self.first :]

    @property
    def begin(self) -> int:
        return int(self.pieces[0, 2])

    @property
    def pitch(self) -> int:
        return sum(self.sizes) - self.begin + self.pad

    @property
    def staging_bytes(self) -> int:
        return 2 * GUARD + self.pitch * len(self.blocks)

    def gathered(self, memory: Bytes, staging: Bytes) -> Bytes:
        """What staging holds after a gather."""
        staging = staging.copy()
        for where, page in self._pairs():
            staging[where] = memory[page]
        return staging

    def scattered(self, memory: Bytes, staging: Bytes) -> Bytes:
        """What the pages hold after a scatter."""
        memory = memory.copy()
        for where, page in self._pairs():
            memory[page] = staging[where]
        return memory

    def sums(self, memory: Bytes) -> list[tuple[int, int]]:
        """What digests of these parts of records are, but for lengths."""
        records = [bytes(self.begin)] * len(self.blocks)
        for at, block in enumerate(self.blocks):
            for base, stride, offset, size in self.fragments.tolist():
                skip = min(size, max(0, self.begin - offset))
                records[at] += memory[base + block * stride + skip :][: size - skip].tobytes()
        return [sums(record) for record in records]

    def _pairs(self) -> list[tuple[slice, slice]]:
        pairs = []
        for at, block in enumerate(self.blocks):
            for base, stride, offset, size in self.fragments.tolist():
                skip = min(size, max(0, self.begin - offset))
                part = GUARD + at * self.pitch + offset + skip - self.begin
                page = base + block * stride + skip
                pairs.append((slice(part, part + size - skip), slice(page, page + size - skip)))
        return pairs


CASES = [
    Case("one lane", [0], [16], 16, [0]),
    Case("two layers of pages", [0, 65536], [2048, 2048], 2048, [5, 0, 3]),
    Case("more turns than one", [0], [6160], 6160, [1, 0]),
    Case("a page of several pieces", [0, 40000], [10000, 10000], 10000, [0, 2], piece_bytes=4096),
    Case("every warp has many", [i * 4096 for i in range(9)], [512] * 9, 512, [7, 1, 2, 3, 6, 5, 4, 0]),
    Case("shares of several pieces, and a rest", [i * 4096 for i in range(7)], [64] * 7, 64, [*range(30, -1, -1)]),
    Case("sizes differ", [0, 4096, 8192, 16384], [16, 1600, 48, 4080], 32768, [1, 0, 2]),
    Case("8-byte lanes", [8, 5000], [1000, 1000], 1000, [2, 0]),
    Case("4-byte lanes", [4, 5000], [740, 740], 740, [0, 3]),
    Case("2-byte lanes", [2, 5000], [314, 314], 314, [4, 1]),
    Case("bytes", [1, 5001], [333, 77], 333, [0, 1]),
    Case("a tail after wide lanes", [0], [4103], 8192, [0, 1], pad=9),
    Case("gaps in staging", [0, 32768], [768, 768], 1024, [3, 2, 1], pad=256),
    Case("words of two fragments", [0, 4096, 8192], [1042, 514, 1027], 16384, [2, 0]),
    Case("rows begun in the middle", [0, 32768], [1040, 4144], 8192, [0, 1]),
    Case("a part of the record", [0, 32768], [6000, 6000], 6000, [0, 1], piece_bytes=1024, first=3),
]
