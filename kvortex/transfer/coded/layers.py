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
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np

from kvortex.transfer.coded._strips import list_groups, part_chunks, pitch_of_all
from kvortex.transfer.coded.plans import DeviceCoder
from kvortex.transfer.layers import Least, run_count
from kvortex.transfer.plan import FIRST_COPY, FIRST_LAUNCH, LAST, Int32s, Int64s, Plan, even, ramp
from kvortex.transfer.profiles.profile import WORTH

_MOST = 4  # groups: a fifth one would hide a 24th of a model's time
# A model computes for at least such a part of the time that its KV is on the link: 12 of 55 ms, where 32K tokens of
# Llama-3-8B's shape were loaded by codec plane on an H200 (docs/transfers.md). Behind shorter prompts it is more.
_COMPUTED = 5


class Cut(NamedTuple):
    """How records are cut into groups. A coder keeps it: it is the same for all loads of so many groups.

    Attributes
    ----------
    edges : (g + 1,) int64
        First tiles of groups, and their number.
    group_of : (L,) int64
        Group of each layer.
    fixed : (g, s, STRIP_COLUMNS) int64
        Strips of each group, but for what differs from record to record.
    rows : (g, k, LAUNCH_COLUMNS) int64
        Launches of a chunk in each group, as :func:`kvortex.transfer.coded._strips.list_groups` takes them.
    likely_pitch : int
        Bytes of a record in a staging buffer, in the widest group.
    """

    edges: Int64s
    group_of: Int64s
    fixed: Int64s
    rows: Int64s
    likely_pitch: int


class Segment(NamedTuple):
    """Chunks of a plan, with their copies and launches numbered from 0 on: (c, ...), and ``marks`` (g,), ``nbytes`` as of
    :class:`kvortex.transfer.plan.Plan`."""

    chunks: Int64s
    copies: Int64s
    launches: Int64s
    marks: Int64s
    nbytes: int


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

    strips: ClassVar[int]  # of a group
    headed: ClassVar[tuple[bool, ...]]  # of the last strips, which launches digest: no more of them than headers say there is
    again = 0  # bytes of a record that every group needs
    least = 0  # where in records that begins which differs from one to the other
    tiles: int  # of a record: of all planes as many, in the order of planes
    runs: ClassVar[tuple[tuple[int, int], tuple[int, int]]]  # tiles of a share, the fewest and the most: of saves, and of loads

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cuts: dict[tuple[int, bytes], Cut | None] = {}

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
        # Those that are kept as they are come first.
        order = np.argsort(slots) if parts is None else np.lexsort((slots, parts < 0))
        slots, kept = slots[order], 0 if parts is None else int(np.count_nonzero(parts >= 0))
        coded = slots[kept:]
        if not len(coded) or not self._can_cut():
            return None
        nbytes, runs = len(coded) * self.codec.slot_bytes, run_count(coded)
        count = coded_group_count(nbytes, len(coded), runs, self.strips, self.again, least)
        cut = self._cut(count, layer_offsets) if count > 1 else None
        if cut is None:
            return None
        ids = self._ids(blocks[order], None if parts is None else parts[order]).astype(np.int32)
        return LayeredLoad(self, cut, ids, slots, order, kept, busy)

    def _cut(self, count: int, layer_offsets: Int64s) -> Cut | None:
        key = count, layer_offsets.tobytes()
        if key not in self._cuts:  # two threads may both do it, to the same end
            self._cuts[key] = self._new_cut(count, layer_offsets)
        return self._cuts[key]

    def _new_cut(self, count: int, layer_offsets: Int64s) -> Cut | None:
        layers, plane_bytes = group_edges(layer_offsets, count), self.codec.shape.plane_bytes
        if len(layers) < 3 or (layer_offsets % plane_bytes).any():
            return None
        edges = layer_offsets[layers] // plane_bytes * (self.tiles // self.codec.shape.planes)
        group_of = np.repeat(np.arange(len(layers) - 1), np.diff(layers))
        rows = [self._launches_of_one(*tiles, self.headed) for tiles in pairwise(edges.tolist())]
        likely_pitch = self.codec.slot_bytes * int(np.diff(edges).max()) // self.tiles + self.again
        return Cut(edges, group_of, self._fixed(edges), np.stack(rows), likely_pitch)

    def _can_cut(self) -> bool:
        """Whether slots hold all that strips are of, whatever is in them."""
        return True

    def _whole(self) -> tuple[Int64s, Int64s]:
        """Of records as they are, in one group: what :class:`Cut` says of groups."""
        fixed = np.array([[[0, self.codec.slot_bytes, 0]]])
        return fixed, self._launches_of_one(0, self.tiles, (True,))[None]

    def _look(self, slots: Int64s, edges: Int64s, begin: Int64s | None) -> Int64s:
        """(n, g): of each record the offsets at some tiles, which nobody writes; (n, 0) where none differ. ``slots`` ascend.
        ``begin`` (n,) are those of the first of ``edges`` (g,); None at the first tile of all."""
        return np.empty((len(slots), 0), np.int64)

    @abstractmethod
    def _fixed(self, edges: Int64s) -> Int64s:
        """Strips of groups that ``edges`` part: what :class:`Cut` says of them."""

    @abstractmethod
    def _launches_of_one(self, first: int, end: int, headed: tuple[bool, ...]) -> Int64s:
        """Launches of a chunk that is record 1 alone, in a group of tiles ``first`` to ``end``. What differs from chunk to
        chunk is filled in later, or a multiple of what is here."""


class LayeredLoad:
    """A load in groups of layers, planned in two parts: the first group, and the others while that moves.

    Parameters
    ----------
    coder, cut, busy
    ids, slots, order
        Of the plan; slots ascend among the ``kept`` records that are kept as they are, which come first, and among the others.

    Attributes
    ----------
    group_of : (L,) int64
        Group of each layer.
    records : int
    """

    def __init__(
        self, coder: LayeredCoder, cut: Cut, ids: Int32s, slots: Int64s, order: Int64s, kept: int, busy: bool
    ) -> None:
        self._coder, self._cut, self._busy = coder, cut, busy
        self._ids, self._order, self._kept = ids, order, kept
        self._kept_slots, self._slots = slots[:kept], slots[kept:]
        self.group_of, self.records = cut.group_of, len(slots)

    def first(self) -> Plan:
        """The first group, and all of what is not coded. Before :meth:`rest`."""
        coder, slots, cut = self._coder, self._slots, self._cut
        offsets = coder._look(slots, cut.edges[:2], None)
        per = coder._buffer_bytes // pitch_of_all(cut.fixed, offsets, coder.least, coder.codec.slot_bytes)
        rest = coder._buffer_bytes // cut.likely_pitch
        if per > rest > 0:  # so that parts of these chunks fill buffers too
            per -= per % rest
        starts = even(len(slots), per, coder._buffers if self._busy else 1)
        done, groups = np.full(len(starts), coder.least), (cut.fixed[:1], cut.rows[:1])
        first, self._done = self._listed(slots, self._kept, starts, starts[-1:], groups, offsets, done)
        self._starts, self._begin = starts, offsets[:, -1] if offsets.size else None
        return self._joined([self._as_they_are(), first] if self._kept else [first])

    def rest(self) -> Plan:
        """The others."""
        coder, slots, cut = self._coder, self._slots, self._cut
        groups, offsets = (cut.fixed[1:], cut.rows[1:]), coder._look(slots, cut.edges[1:], self._begin)
        bounds = coder.least, coder.codec.slot_bytes, coder._buffer_bytes
        starts, of = part_chunks(groups[0], offsets, self._starts, len(slots), self._done, *bounds)
        tail, last = starts[-1:], int(starts[-1])
        if not self._busy:  # the end is not to wait for a long last launch
            tail = last + ramp(len(slots) - last, len(slots) - last, LAST)
        return self._joined([self._listed(slots, self._kept, starts, tail, groups, offsets, self._done[of])[0]])

    def whole(self) -> Plan:
        """All of it, one group behind another."""
        plans = self.first(), self.rest()
        return self._joined([Segment(plan.chunks, plan.copies, plan.launches, plan.marks, plan.nbytes) for plan in plans])

    def _as_they_are(self) -> Segment:
        """Records that are kept as they are, in the first group: without a mark of their own."""
        coder, starts = self._coder, even(self._kept, self._coder._per_chunk, 1)
        offsets, done = np.empty((self._kept, 0), np.int64), np.zeros(len(starts), np.int64)
        made, _ = self._listed(self._kept_slots, 0, starts, starts[-1:], coder._whole(), offsets, done)
        return made._replace(marks=made.marks[:0])

    def _listed(
        self,
        slots: Int64s,
        kept: int,
        starts: Int64s,
        tail: Int64s,
        groups: tuple[Int64s, Int64s],
        offsets: Int64s,
        done: Int64s,
    ) -> tuple[Segment, Int64s]:
        """Of :func:`kvortex.transfer.coded._strips.list_groups`, and where that ends which is digested by then."""
        coder, (fixed, rows) = self._coder, groups
        bounds, most = (coder.least, coder.codec.slot_bytes), (coder.most_ctas[1], coder.runs[1][1])
        pool = coder._pool.address, coder._pool.slot_bytes, coder._pool.segment_slots
        where = slots, kept, starts, tail, fixed, offsets, done
        chunks, copies, launches, marks, done, nbytes = list_groups(*where, *bounds, rows, pool, *most)
        return Segment(chunks, copies, launches, marks, nbytes), done

    def _joined(self, segments: list[Segment]) -> Plan:
        chunks, copies, launches, marks, nbytes = segments[0]
        for more in segments[1:]:
            more.chunks[:, FIRST_COPY] += len(copies)
            more.chunks[:, FIRST_LAUNCH] += len(launches)
            marks = np.append(marks, more.marks + len(chunks))
            chunks, copies = np.concatenate((chunks, more.chunks)), np.concatenate((copies, more.copies))
            launches, nbytes = np.concatenate((launches, more.launches)), nbytes + more.nbytes
        room = self._coder.codec.slot_bytes
        return Plan(self._ids, chunks, copies, nbytes, room, marks=marks, order=self._order, launches=launches)
