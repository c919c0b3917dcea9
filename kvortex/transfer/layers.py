"""Layer-wise plans: the first layers of all blocks cross the link before the last ones, so a model can start on them.

Layers travel in *groups*, since a copy of a few KiB costs as much as one of many. A group is one *section* of each record,
or several where it is larger than a staging buffer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvortex.transfer._layers import list_sections
from kvortex.transfer.plan import (
    BASE,
    BYTES,
    CHUNK_COLUMNS,
    COPY_BYTES,
    DEVICE_SIDE,
    FIRST_BLOCK,
    FIRST_COPY,
    HOST_SIDE,
    LINES,
    N_BLOCKS,
    N_COPIES,
    OFFSET,
    STRIDE,
    Int32s,
    Int64s,
    Plan,
    Pool,
    cut_parts,
    empty_copies,
)

_LANE = 16
_FIRST_JOINED, _MOST_JOINED, _LAST_JOINED = (1, 1, 2), 3, (2, 2, 1, 1, 1)


class Least(NamedTuple):
    """Bytes that outweigh what things cost beside their bytes.

    Attributes
    ----------
    line, copy
        Of a line of a 2D copy, and of all of its lines.
    group
        Of a group in all records.
    """

    line: int
    copy: int
    group: int


def cut_layers(fragments: Int64s, layer_offsets: Int64s) -> Int64s:
    """(F', 4) int64: fragments, cut where a layer begins inside one."""
    if not len(fragments):
        return fragments
    begin, end = fragments[:, OFFSET], fragments[:, OFFSET] + fragments[:, BYTES]
    edges = np.unique(np.concatenate((begin, end, layer_offsets[(layer_offsets > begin[0]) & (layer_offsets < end[-1])])))
    of = np.searchsorted(begin, edges[:-1], side="right") - 1
    cut = fragments[of]
    within = edges[:-1] - cut[:, OFFSET]
    cut[:, BASE] += within
    cut[:, OFFSET] = edges[:-1]
    cut[:, BYTES] = np.diff(edges)
    return cut


def group_count(num_layers: int, record_bytes: int, records: int, runs: int, least: Least) -> int:
    """Groups that a transfer of so many records is worth.

    ``runs`` is how many copies bring a section of all records: one where records are neighbours, a line of it each, and
    otherwise up to one for each record.
    """
    nbytes = records * record_bytes
    worth = min(record_bytes // least.line, nbytes // (runs * least.copy), nbytes // least.group)
    return max(1, min(num_layers, worth))


class Ordered(NamedTuple):
    """Records of a transfer in the order of their slots: pages, (n,) int32; slots; and where each was before."""

    ids: Int32s
    slots: Int64s
    order: Int64s

    @property
    def runs(self) -> int:
        """Runs of neighbours among the slots."""
        return run_count(self.slots)


def in_order(blocks: Int64s, slots: Int64s) -> Ordered:
    """Of pages and slots in any order."""
    order = np.argsort(slots)
    return Ordered(blocks[order].astype(np.int32), slots[order], order)


def run_count(slots: Int64s) -> int:
    """Runs of neighbours among slots, which ascend."""
    return 1 + int(np.count_nonzero(slots[1:] - slots[:-1] != 1))


def group_layers(layer_offsets: Int64s, count: int) -> Int64s:
    """First layers of at most ``count`` groups of about as many bytes each, and the number of layers, (g + 1,) int64."""
    wanted = layer_offsets[-1] * np.arange(count + 1) // count
    nearest: Int64s = np.unique(np.searchsorted(layer_offsets[1:] + layer_offsets[:-1], 2 * wanted))
    return nearest


def join_groups(edges: Int64s) -> Int64s:
    """Groups of up to three of those that ``edges`` part, but for the first and the last ones, (g + 1,) int64.

    Longer lines and fewer copies move faster: at 64 KiB a line of a 2D DMA costs 3 percent of its time beside its bytes. But a
    model has nothing else to do while it waits for its first layers, and when all but the last ones are done. Towards the end
    groups become smaller step by step, so that what a model has still to do with one is done when the next one is there,
    where it computes a layer in two thirds of the time that one takes on the link.
    """
    middle = len(edges) - 1 - sum(_FIRST_JOINED) - sum(_LAST_JOINED)
    if middle < 0:
        return edges
    sizes = [*_FIRST_JOINED, *[_MOST_JOINED] * (middle // _MOST_JOINED), middle % _MOST_JOINED, *_LAST_JOINED]
    joined: Int64s = np.unique(edges[np.cumsum([0, *sizes])])
    return joined


@dataclass(frozen=True)
class Sections:
    """How a record is cut.

    Attributes
    ----------
    first_pieces : (s + 1,) int64
        First piece of each section, and the number of pieces.
    offsets, nbytes : (s,) int64
        Of each section in the record.
    ends : (g,) int64
        Sections up to the end of each group.
    group_of : (L,) int64
        Group of each layer.
    """

    first_pieces: Int64s
    offsets: Int64s
    nbytes: Int64s
    ends: Int64s
    group_of: Int64s

    @functools.cached_property
    def pitch(self) -> int:
        """Bytes that any section of one record takes in a staging buffer."""
        return -(-int(self.nbytes.max()) // _LANE) * _LANE

    @functools.cached_property
    def total(self) -> int:
        """Bytes of all sections of one record."""
        return int(self.nbytes.sum())


def cut_sections(pieces: Int64s, layer_offsets: Int64s, edges: Int64s, buffer_bytes: int | None) -> Sections:
    """Cuts a record into groups of layers, and those where they do not fit into a staging buffer.

    Parameters
    ----------
    pieces : (P, 4) int64
        None of which spans two layers.
    layer_offsets : (L + 1,) int64
        Of :class:`kvortex.layout.KVLayout`.
    edges : (g + 1,) int64
        First layers of groups, and the number of layers.
    buffer_bytes
        A multiple of 16; None for no limit.
    """
    at = np.append(np.searchsorted(pieces[:, OFFSET], layer_offsets[edges[:-1]]), len(pieces))
    firsts, ends = [0], []
    for first, last in zip(at[:-1].tolist(), at[1:].tolist(), strict=True):
        inner = [0, last - first] if buffer_bytes is None else cut_parts(pieces[first:last], buffer_bytes).tolist()
        firsts += [first + cut for cut in inner[1:]]
        ends.append(len(firsts) - 1)
    cuts = np.array(firsts, np.int64)
    offsets = pieces[cuts[:-1], OFFSET]
    nbytes = pieces[cuts[1:] - 1, OFFSET] + pieces[cuts[1:] - 1, BYTES] - offsets
    return Sections(cuts, offsets, nbytes, np.array(ends, np.int64), np.repeat(np.arange(len(edges) - 1), np.diff(edges)))


def split_sections(sections: Sections, groups: int) -> tuple[Sections, Sections]:
    """The first ``groups`` groups, and the others: at least one each. ``group_of`` of the others counts from their first one,
    and is below 0 for the layers before."""
    at = int(sections.ends[groups - 1])
    first = sections.first_pieces[: at + 1], sections.offsets[:at], sections.nbytes[:at], sections.ends[:groups]
    others = sections.first_pieces[at:], sections.offsets[at:], sections.nbytes[at:], sections.ends[groups:] - at
    return Sections(*first, sections.group_of), Sections(*others, sections.group_of - groups)


def plan_layers(
    records: Ordered, sections: Sections, pool: Pool, buffer_bytes: int, max_blocks: int, *, ctas: int = 0
) -> Plan:
    """A transfer through staging buffers, section after section. Parameters as of :func:`kvortex.transfer.plan.plan_staged`."""
    ids, slots, order = records
    n, pitch = len(slots), sections.pitch
    per_chunk, where = max(1, min(buffer_bytes // pitch, max_blocks)), (pool.segment_slots, pool.address, pool.slot_bytes)
    chunks, copies = list_sections(slots, per_chunk, *where, sections.first_pieces, sections.offsets, sections.nbytes, pitch)
    return _plan(ids, chunks, copies, sections, n, pitch, ctas, order)


def plan_direct_layers(records: Ordered, fragment: Int64s, sections: Sections, pool: Pool, streams: int) -> Plan:
    """The same for records that are one contiguous fragment, ``BASE, STRIDE, OFFSET, BYTES``: by DMA alone."""
    blocks, slots, order = records.ids.astype(np.int64), records.slots, records.order
    n, count = len(slots), len(sections.offsets)
    starts = np.arange(0, n, max(1, n // (2 * streams)))
    copies = empty_copies(count * n).reshape(count, n, -1)
    copies[..., DEVICE_SIDE] = fragment[BASE] + blocks * fragment[STRIDE] + sections.offsets[:, None]
    copies[..., HOST_SIDE] = pool.address + slots * pool.slot_bytes + sections.offsets[:, None]
    copies[..., COPY_BYTES] = sections.nbytes[:, None]
    chunks = _direct_chunks(count, starts, n).reshape(-1, CHUNK_COLUMNS)
    return _plan(np.empty(0, np.int32), chunks, copies.reshape(-1, copies.shape[2]), sections, n, 0, 0, order)


def split_groups(plan: Plan) -> list[Plan]:
    """A plan for each group of a layer-wise one."""
    edges = [0, *plan.marks.tolist()]
    return [_group(plan, plan.chunks[first:last]) for first, last in zip(edges[:-1], edges[1:], strict=True)]


def _group(plan: Plan, chunks: Int64s) -> Plan:
    copies = plan.copies[chunks[0, FIRST_COPY] : chunks[-1, FIRST_COPY] + chunks[-1, N_COPIES]]
    nbytes = int((copies[:, COPY_BYTES] * copies[:, LINES]).sum())
    return Plan(plan.ids, chunks, plan.copies, nbytes, plan.pitch, plan.ctas, order=plan.order)


def _direct_chunks(count: int, starts: Int64s, records: int) -> Int64s:
    """(sections, chunks, columns): the same records for each section, with a copy each."""
    chunks = np.zeros((count, len(starts), CHUNK_COLUMNS), np.int64)
    chunks[..., FIRST_BLOCK] = starts
    chunks[..., FIRST_COPY] = starts + records * np.arange(count)[:, None]
    chunks[..., N_BLOCKS] = chunks[..., N_COPIES] = np.diff(np.append(starts, records))
    return chunks


def _plan(
    ids: Int32s, chunks: Int64s, copies: Int64s, sections: Sections, records: int, pitch: int, ctas: int, order: Int64s
) -> Plan:
    marks = sections.ends * (len(chunks) // len(sections.offsets))
    nbytes = sections.total * records
    return Plan(ids, chunks, copies, nbytes, pitch, ctas, marks, order=order if len(ids) else np.empty(0, np.int64))
