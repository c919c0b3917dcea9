"""What a coded load in groups of layers is to be, record by record: tails, strips, chunks, copies and launches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvortex.codecs.base import HEADER
from kvortex.codecs.lossy import LossyCodec
from kvortex.codecs.plane import PlaneCodec
from kvortex.kernels.plane_form import FIXED_BYTES
from kvortex.transfer.plan import ABSOLUTE, BUFFER, COUNTER, IDS, LAST, LAUNCH_COLUMNS, STATUS, SUMS, even, ramp


def naive_offsets(codec: PlaneCodec, record: npt.NDArray[np.uint8], edges: list[int], back: bool = False) -> list[int]:
    """Where tails begin as a table says, and where they all end as the header does; ``back``, whether from there it is told
    where the last ones begin."""
    found, at = [], codec.fixed_bytes
    for tile in range(codec.tiles + 1):
        if tile in edges:
            found.append(min(at, codec.slot_bytes))
        if tile < codec.tiles:
            at += tail_bytes(record, tile)
    if edges[-1] == codec.tiles:
        before = found[-2 - back]
        found[-1] = max(before, min(int(record[:64].view(HEADER)[0]["used_bytes"]), codec.slot_bytes))
        if back:
            found[-2] = max(before, found[-1] - sum(tail_bytes(record, tile) for tile in range(edges[-2], codec.tiles)))
    return found


def tail_bytes(record: npt.NDArray[np.uint8], tile: int) -> int:
    """As a table says; 0 for what no tile has."""
    entry = int(record[64 + 4 * tile : 68 + 4 * tile].view(np.uint32)[0])
    count, escapes = entry & 0xFFFF, entry >> 16
    size = 12 * -(-count // 32) + 4 * -(-escapes // 4)
    return 768 if entry == 0xFFFFFFFF else 0 if count > 1024 or escapes > count or size > 764 else size


class Strip(NamedTuple):
    """Bytes of each record, where those begin that are digested, None for none, and whether no more than its header says."""

    begin: int
    end: int
    digested: int | None
    headed: bool


@dataclass
class Listed:
    """Rows of a :class:`kvortex.transfer.plan.Plan`."""

    chunks: list[list[int]] = field(default_factory=list)
    copies: list[list[int]] = field(default_factory=list)
    launches: list[list[int]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)


@dataclass
class NaiveLoad:
    """A load in groups that ``edges`` part, of records in slots in the order of a plan, the first ``kept`` as they are."""

    coder: Any
    records: list[npt.NDArray[np.uint8]]
    slots: list[int]
    kept: int
    edges: list[int]
    busy: bool

    def first(self) -> Listed:
        coder, n, made = self.coder, len(self.slots), Listed()
        done = [coder.codec.fixed_bytes if isinstance(coder.codec, PlaneCodec) else 0] * n  # of each record, what is digested
        pitch = sum(strip.end - strip.begin for strip in self.strips(0, range(self.kept, n), done))
        likely = coder.codec.slot_bytes * int(np.diff(self.edges).max()) // coder.tiles + coder.again
        per, rest = coder._buffer_bytes // pitch, coder._buffer_bytes // likely
        if per > rest > 0:
            per -= per % rest
        if self.kept:
            whole = [Strip(0, coder.codec.slot_bytes, 0, True)]
            for chunk in chunks_of(range(self.kept), even(self.kept, coder._per_chunk, 1).tolist()):
                self.add(made, chunk, whole, 0, coder.tiles)
        starts = self.kept + even(n - self.kept, per, coder._buffers if self.busy else 1)
        self.chunks = chunks_of(range(self.kept, n), starts.tolist())
        self.done = done
        self.group(made, 0, self.chunks, self.chunks)
        return made

    def rest(self) -> Listed:
        coder, made, parts = self.coder, Listed(), []
        for chunk in self.chunks:
            done, widest = self.done.copy(), 0
            for g in range(1, len(self.edges) - 1):
                strips = self.strips(g, chunk, done)
                widest = max(widest, sum(strip.end - strip.begin for strip in strips))
                for b in chunk:
                    done[b] = strips[-1].end
            pieces = -(-len(chunk) // min(coder._buffer_bytes // widest, len(chunk)))
            size = -(-len(chunk) // pieces)
            parts += [chunk[at : at + size] for at in range(0, len(chunk), size)]
        last = parts[-1]
        tail = chunks_of(last, [last[0] + at for at in ramp(len(last), len(last), LAST).tolist()])
        for g in range(1, len(self.edges) - 1):
            ends = g == len(self.edges) - 2 and not self.busy
            self.group(made, g, parts, [*parts[:-1], *tail] if ends else parts)
        return made

    def group(self, made: Listed, g: int, parts: list[range], chunks: list[range]) -> None:
        """``chunks`` of a group, each in one of ``parts``, whose strips it has."""
        for part in parts:
            strips = self.strips(g, part, self.done)
            for chunk in chunks:
                if chunk[0] in part:
                    self.add(made, chunk, strips, self.edges[g], self.edges[g + 1])
            for b in part:
                self.done[b] = strips[-1].end
        made.marks.append(len(made.chunks))

    def strips(self, g: int, chunk: range, done: list[int]) -> list[Strip]:
        codec, (first, end) = self.coder.codec, self.edges[g : g + 2]
        if isinstance(codec, LossyCodec):
            each = self.coder.tiles // codec.shape.planes
            sizes = [codec.key_bytes if part == "K" else codec.value_bytes for part in codec.shape.parts_of_planes]
            low, high = (64 + sum(sizes[: tile // each]) for tile in (first, end))
            return [Strip(low if first else 0, high, low if first else 0, False)]
        head = codec.fixed_bytes - FIXED_BYTES * codec.tiles
        low, high = (head + FIXED_BYTES * tile for tile in (first, end))
        front = [Strip(0, head, None, False), Strip(low, high, low, False)] if first else [Strip(0, high, 0, False)]
        edges = self.edges
        back = len(edges) > 3 and edges[-1] - edges[-2] < edges[-2] - edges[-3]
        offsets = [naive_offsets(codec, self.records[b], edges, back) for b in chunk]
        begin = max(min(row[g] for row in offsets) // 64 * 64, codec.fixed_bytes)
        stop = min(-(-max(row[g + 1] for row in offsets) // 64) * 64, codec.slot_bytes)
        return [*front, Strip(begin, max(stop, done[chunk[0]]), done[chunk[0]], True)]

    def add(self, made: Listed, chunk: range, strips: list[Strip], first: int, end: int) -> None:
        pool, before = self.coder._pool, len(made.copies)
        pitch = sum(strip.end - strip.begin for strip in strips)
        for run in self.runs(chunk):
            at = (run[0] - chunk[0]) * pitch
            for strip in strips:
                width = strip.end - strip.begin
                if width:
                    where = pool.address + self.slots[run[0]] * pool.slot_bytes + strip.begin
                    made.copies.append([at, where, width, len(run), pitch, pool.slot_bytes])
                at += width
        launches = self.launches(chunk, strips, pitch, first, end)
        rows = [chunk[0], len(chunk), 0, 1, before, len(made.copies) - before, 0, len(made.launches), len(launches)]
        made.chunks.append(rows)
        made.launches += launches

    def runs(self, chunk: range) -> list[list[int]]:
        runs: list[list[int]] = []
        for b in chunk:
            slot, each = self.slots[b], self.coder._pool.segment_slots
            if runs and self.slots[b - 1] == slot - 1 and slot // each == (slot - 1) // each:
                runs[-1].append(b)
            else:
                runs.append([b])
        return runs

    def launches(self, chunk: range, strips: list[Strip], pitch: int, first: int, end: int) -> list[list[int]]:
        coder, n, at, made = self.coder, len(chunk), 0, []
        most = coder.most_ctas[1]
        for strip in strips:
            if strip.digested is not None and coder._numbers:
                ctas = min(max(-(-n * -(-(strip.end - strip.digested) // 4096) // 8), 1), most)
                span = strip.digested, strip.end, strip.begin - at, int(strip.headed)
                head = (BUFFER, 0), (ABSOLUTE, pitch), (ABSOLUTE, n), (ABSOLUTE, coder._numbers), (SUMS, 16 * chunk[0])
                made.append(self.launch("read_records", ctas, [*head, *((ABSOLUTE, value) for value in span)]))
            at += strip.end - strip.begin
        tiles = end - first
        turns = -(-n * tiles // (8 * most * coder.runs[1][1]))
        run = -(-n * tiles // (8 * most * turns))
        ctas = min(most, -(-n * -(-tiles // run) // 8))
        ids = chunk[0] * (4 if isinstance(coder.codec, PlaneCodec) else 8)
        head = (BUFFER, 0), (ABSOLUTE, pitch), (ABSOLUTE, coder._cells), (STATUS, 4 * chunk[0]), (IDS, ids)
        span = n, run, first, end, *([strips[-1].begin] if isinstance(coder.codec, PlaneCodec) else [])
        return [*made, self.launch(coder.decoder, ctas, [*head, *((ABSOLUTE, value) for value in span)])]

    def launch(self, kernel: str, ctas: int, parameters: list[tuple[int, int]]) -> list[int]:
        parameters = [*parameters, (COUNTER, 0)]
        row = [self.coder._kernels[kernel], ctas, 256, sum(base << 4 * at for at, (base, _) in enumerate(parameters))]
        row += [value for _, value in parameters]
        return row + [0] * (LAUNCH_COLUMNS - len(row))


def chunks_of(records: range, starts: list[int]) -> list[range]:
    """Records of chunks that begin with those of ``starts``."""
    return [range(first, end) for first, end in zip(starts, [*starts[1:], records.stop], strict=True)]
