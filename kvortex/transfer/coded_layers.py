"""Layer-wise loads of coded records on a GPU: groups of layers, of each record no more than a group needs.

Chunks come group by group, all records in each, and a mark behind each group. What a chunk brings of a record are *strips*:
ranges of its bytes that lie side by side in the staging buffer, so that a buffer holds the more records the fewer layers a
group has. Kernels decode the group's tiles from there. Each byte of a record is digested in one group, and each byte that a
group decodes in this group or one before it: nobody writes to a slot meanwhile.

Where a strip ends may depend on the record (tails of the plane code). Then all records of a chunk get the widest, and what is
digested ends there for all of them; so chunks of later groups are parts of those of earlier ones.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

from kvortex.transfer.coded import DeviceCoder
from kvortex.transfer.layers import Least, run_count
from kvortex.transfer.plan import (
    CHUNK_COLUMNS,
    COPY_BYTES,
    DEVICE_SIDE,
    FIRST_BLOCK,
    FIRST_COPY,
    FIRST_LAUNCH,
    HOST_PITCH,
    HOST_SIDE,
    LAST,
    LAUNCH_COLUMNS,
    LINES,
    N_BLOCKS,
    N_COPIES,
    N_LAUNCHES,
    N_PIECES,
    PITCH,
    Int64s,
    Plan,
    Pool,
    empty_copies,
    even,
    neighbours,
    ramp,
)
from kvortex.transfer.profile import WORTH

_MOST = 4  # groups: a fifth one would hide a 24th of a model's time
# A model computes for at least such a part of the time that its KV is on the link: 12 of 55 ms, where 32K tokens of
# Llama-3-8B's shape were loaded by codec plane on an H200 (docs/transfers.md). Behind shorter prompts it is more.
_COMPUTED = 5


class Strip(NamedTuple):
    """Bytes ``begin`` to ``end`` of each record of a chunk, multiples of 16; (c,) int64.

    ``digested`` (c,) is where those begin that this strip's launch digests, up to ``end``; None for none. Of records that are
    ``headed`` no more of them than their headers say that there are.
    """

    begin: Int64s
    end: Int64s
    digested: Int64s | None
    headed: bool = False

    def of(self, chunks: Int64s) -> Strip:
        """For parts of those chunks."""
        digested = None if self.digested is None else self.digested[chunks]
        return Strip(self.begin[chunks], self.end[chunks], digested, self.headed)


class Span(NamedTuple):
    """A group: tiles ``first`` to ``end``, and the strips that its chunks bring of each record."""

    first: int
    end: int
    strips: tuple[Strip, ...]

    @property
    def pitch(self) -> Int64s:
        """(c,): bytes of a record in a staging buffer."""
        total: Int64s = np.sum([strip.end - strip.begin for strip in self.strips], axis=0)
        return total

    def of(self, chunks: Int64s) -> Span:
        """For parts of those chunks."""
        return Span(self.first, self.end, tuple(strip.of(chunks) for strip in self.strips))


class Segment(NamedTuple):
    """Chunks of a plan that have launches of the same kernels, (c, ...), with their copies; numbered from 0 on."""

    chunks: Int64s
    copies: Int64s
    launches: Int64s


def group_edges(layer_offsets: Int64s, count: int) -> Int64s:
    """First layers of at most ``count`` groups, and the number of layers: the first and the last one half as long as those
    between. A model has nothing else to do while it waits for the first one, nor when only the last one is left to compute."""
    halves = np.cumsum([0, 1, *[2] * (count - 2), 1]) if count > 1 else np.arange(2)
    wanted = layer_offsets[-1] * halves // halves[-1]
    edges: Int64s = np.unique(np.searchsorted(layer_offsets[1:] + layer_offsets[:-1], 2 * wanted))
    return edges


def coded_group_count(nbytes: int, records: int, runs: int, strips: int, again: int, least: Least) -> int:
    """Groups that a load is worth.

    The last of G groups of :func:`group_edges` is computed when nothing moves any more: 1 / (2 G - 2) of the layers, or all of
    them. One group more is worth it where that becomes shorter by more than the group costs: a line of each strip of each
    record, a copy of each strip and run, and what every group needs of a record.

    Parameters
    ----------
    nbytes, records
        Of all that is loaded.
    runs
        Of neighbours in the pool.
    strips
        Of a group.
    again
        Bytes of each record that each group needs.
    least
    """
    cost = records * (strips * (least.line // WORTH) + again) + strips * runs * least.copy + least.group
    count = 1
    while count < _MOST and nbytes // _COMPUTED > 2 * max(1, count * (count - 1)) * cost:
        count += 1
    return count


class LayeredCoder(DeviceCoder):
    """A codec whose kernels decode some tiles of records, of which less than all lies in staging."""

    strips: ClassVar[int]  # of a group, at most
    again = 0  # bytes of a record that every group needs
    tiles: int  # of a record: of all planes as many, in the order of planes

    def layered(
        self, blocks: Int64s, slots: Int64s, busy: bool, parts: Int64s | None, layer_offsets: Int64s, least: Least
    ) -> LayeredLoad | None:
        """A load in groups; None where one is best, or pages have no layers of whole planes.

        Parameters
        ----------
        blocks, slots, busy, parts
            As of :meth:`plan`.
        layer_offsets : (L + 1,) int64
            Of the layout.
        least
            Of the profile.
        """
        coded = np.arange(len(slots)) if parts is None else np.flatnonzero(parts < 0)
        plane_bytes, room = self.codec.shape.plane_bytes, self.codec.slot_bytes
        if not len(coded) or (layer_offsets % plane_bytes).any() or not self._can_cut():
            return None
        runs = run_count(slots[coded])
        count = coded_group_count(len(coded) * room, len(coded), runs, self.strips, self.again, least)
        layers = group_edges(layer_offsets, count)
        if len(layers) < 3:
            return None
        edges = layer_offsets[layers] // plane_bytes * (self.tiles // self.codec.shape.planes)
        group_of = np.repeat(np.arange(len(layers) - 1), np.diff(layers))
        return LayeredLoad(self, blocks, slots, busy, parts, edges, group_of)

    def _can_cut(self) -> bool:
        """Whether slots hold all that strips are of, whatever is in them."""
        return True

    def _whole(self, chunks: int) -> Span:
        """All of each record, as it is."""
        begin = np.zeros(chunks, np.int64)
        return Span(0, self.tiles, (Strip(begin, begin + self.codec.slot_bytes, begin, headed=True),))

    def _look(self, slots: Int64s, edges: Int64s, begin: Int64s | None) -> Int64s:
        """(n, g): of each record the offsets at some tiles, which nobody writes. ``begin`` (n,) are those of the first of
        ``edges`` (g,); None at the first tile of all."""
        return np.zeros((len(slots), len(edges)), np.int64)

    @abstractmethod
    def _spans(self, offsets: Int64s, edges: Int64s, starts: Int64s, done: Int64s | None) -> list[Span]:
        """The groups that ``edges`` (g + 1,) part.

        Parameters
        ----------
        offsets : (n, g + 1) int64
            Of :meth:`_look`.
        edges
        starts : (c,) int64
            First records of chunks.
        done : (c,) int64
            Where what earlier groups have digested of what differs from record to record ends; None at its begin.
        """

    @abstractmethod
    def _decode(self, span: Span, first: Int64s, count: Int64s, most: int) -> Int64s:
        """The launch that decodes a chunk of a group."""

    def _span_rows(self, span: Span, first: Int64s, count: Int64s, most: int) -> list[Int64s]:
        rows, at = [], np.zeros(len(first), np.int64)
        for strip in span.strips:
            if strip.digested is not None and self._numbers:
                where = span.pitch, strip.digested, strip.end, strip.begin - at
                rows.append(self._read(first, count, most, *where, headed=strip.headed))
            at = at + strip.end - strip.begin
        return [*rows, self._decode(span, first, count, most)]


class LayeredLoad:
    """A load in groups of layers, planned in two parts: the first group, and the others while that moves.

    Attributes
    ----------
    group_of : (L,) int64
        Group of each layer.
    records : int
    """

    def __init__(
        self,
        coder: LayeredCoder,
        blocks: Int64s,
        slots: Int64s,
        busy: bool,
        parts: Int64s | None,
        edges: Int64s,
        group_of: Int64s,
    ) -> None:
        coded = np.ones(len(slots), np.bool_) if parts is None else parts < 0
        self._order = order = np.lexsort((slots, coded))  # those that are kept as they are come first
        self._kept = int((~coded).sum())
        self._slots = slots[order]
        self._ids = coder._ids(blocks[order], None if parts is None else parts[order]).astype(np.int32)
        self._coder, self._edges, self._busy = coder, edges, busy
        self.group_of, self.records = group_of, len(slots)

    def first(self) -> Plan:
        """The first group, and all of what is not coded. Before :meth:`rest`."""
        coder, slots = self._coder, self._slots[self._kept :]
        offsets = coder._look(slots, self._edges[:2], None)
        (widest,) = coder._spans(offsets, self._edges[:2], np.zeros(1, np.int64), None)
        per = coder._buffer_bytes // int(widest.pitch[0])
        rest = coder._buffer_bytes // self._likely_pitch()
        if per > rest > 0:  # so that parts of these chunks fill buffers too
            per -= per % rest
        self._starts = even(len(slots), per, coder._buffers if self._busy else 1)
        (span,) = coder._spans(offsets, self._edges[:2], self._starts, None)
        self._begin, self._done = offsets[:, -1], span.strips[-1].end
        segments = [self._segment(span, self._starts, self._kept)]
        if self._kept:
            starts = even(self._kept, coder._per_chunk, 1)
            segments.insert(0, self._segment(coder._whole(len(starts)), starts, 0))
        return self._plan([segments])

    def rest(self) -> Plan:
        """The others."""
        coder, slots, edges = self._coder, self._slots[self._kept :], self._edges[1:]
        offsets = coder._look(slots, edges, self._begin)
        wide = coder._spans(offsets, edges, self._starts, self._done)
        most = coder._buffer_bytes // np.max([span.pitch for span in wide], axis=0)
        starts, of = _parts(self._starts, len(slots), most)
        *spans, last = coder._spans(offsets, edges, starts, self._done[of])
        groups = [[self._segment(span, starts, self._kept)] for span in spans]
        if not self._busy:  # the end is not to wait for a long last launch
            tail = starts[-1] + ramp(len(slots) - int(starts[-1]), len(slots) - int(starts[-1]), LAST)
            last = last.of(np.append(np.arange(len(starts) - 1), np.full(len(tail), len(starts) - 1)))
            starts = np.append(starts[:-1], tail)
        return self._plan([*groups, [self._segment(last, starts, self._kept)]])

    def whole(self) -> Plan:
        """All of it, one group behind another."""
        first, rest = self.first(), self.rest()
        segments = [Segment(plan.chunks, plan.copies, plan.launches) for plan in (first, rest)]
        marks = np.append(first.marks, rest.marks + len(first.chunks))
        return self._joined(segments, marks, first.nbytes + rest.nbytes)

    def _likely_pitch(self) -> int:
        """Of the widest of the other groups."""
        part = self._coder.codec.slot_bytes * int(np.diff(self._edges).max()) // self._coder.tiles
        return part + self._coder.again

    def _segment(self, span: Span, starts: Int64s, behind: int) -> Segment:
        """Chunks that bring strips of the records from ``behind`` on, the first one of each at ``starts`` there."""
        coder = self._coder
        slots = self._slots[behind:] if behind else self._slots[: self._kept or len(self._slots)]
        count, first = np.diff(np.append(starts, len(slots))), behind + starts
        copies, copies_of = _copies(slots, starts, span, coder._pool)
        rows = coder._span_rows(span, first, count, coder.most_ctas[self._busy])
        chunks = np.zeros((len(starts), CHUNK_COLUMNS), np.int64)
        chunks[:, FIRST_BLOCK], chunks[:, N_BLOCKS], chunks[:, N_PIECES] = first, count, 1
        chunks[:, N_COPIES], chunks[:, FIRST_COPY] = copies_of, np.cumsum(copies_of) - copies_of
        chunks[:, N_LAUNCHES], chunks[:, FIRST_LAUNCH] = len(rows), np.arange(len(chunks)) * len(rows)
        return Segment(chunks, copies, np.stack(rows, axis=1).reshape(-1, LAUNCH_COLUMNS))

    def _plan(self, groups: list[list[Segment]]) -> Plan:
        marks = np.cumsum([sum(len(segment.chunks) for segment in group) for group in groups])
        segments = [segment for group in groups for segment in group]
        nbytes = sum(int((segment.copies[:, COPY_BYTES] * segment.copies[:, LINES]).sum()) for segment in segments)
        return self._joined(segments, marks, nbytes)

    def _joined(self, segments: list[Segment], marks: Int64s, nbytes: int) -> Plan:
        copies, launches = 0, 0
        for chunks, mine, rows in segments:
            chunks[:, FIRST_COPY] += copies
            chunks[:, FIRST_LAUNCH] += launches
            copies, launches = copies + len(mine), launches + len(rows)
        chunks, moved, rows = (np.concatenate(column) for column in zip(*segments, strict=True))
        room = self._coder.codec.slot_bytes
        return Plan(self._ids, chunks, moved, nbytes, room, marks=marks, order=self._order, launches=rows)


def _parts(starts: Int64s, records: int, most: Int64s) -> tuple[Int64s, Int64s]:
    """First records of parts of chunks, at most so many records of each chunk in one, and the chunk of each part."""
    count = np.diff(np.append(starts, records))
    pieces = -(-count // np.minimum(most, count))
    size = -(-count // pieces)
    pieces = -(-count // size)
    of = np.repeat(np.arange(len(starts)), pieces)
    within = np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return starts[of] + within * size[of], of


def _copies(slots: Int64s, starts: Int64s, span: Span, pool: Pool) -> tuple[Int64s, Int64s]:
    """Copies of strips side by side, one of each strip for each run of neighbours, and how many each chunk has."""
    heads, lengths, chunk_of = neighbours(slots, starts, pool)
    pitch, at = span.pitch, np.zeros(len(starts), np.int64)
    copies = empty_copies(len(heads) * len(span.strips)).reshape(len(heads), len(span.strips), -1)
    for k, strip in enumerate(span.strips):
        mine, width = copies[:, k], strip.end - strip.begin
        mine[:, DEVICE_SIDE] = ((heads - starts[chunk_of]) * pitch[chunk_of]) + at[chunk_of]
        mine[:, HOST_SIDE] = pool.address + slots[heads] * pool.slot_bytes + strip.begin[chunk_of]
        mine[:, COPY_BYTES], mine[:, LINES] = width[chunk_of], lengths
        mine[:, PITCH], mine[:, HOST_PITCH] = pitch[chunk_of], pool.slot_bytes
        at = at + width
    there = copies[..., COPY_BYTES] > 0
    copies_of = np.bincount(chunk_of, there.sum(axis=1), len(starts)).astype(np.int64)
    return copies[there], copies_of
