"""Plans of blocks of one layout, by whatever route they are to go: arrays, for which no GPU is asked."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvortex.transfer.layers import (
    Ordered,
    Sections,
    cut_layers,
    cut_sections,
    group_layers,
    join_groups,
    plan_direct_layers,
    plan_layers,
    split_sections,
)
from kvortex.transfer.plan import (
    BYTES,
    LINES_OF_RUN,
    Int64s,
    Plan,
    Pool,
    plan_batched,
    plan_direct,
    plan_mapped,
    plan_staged,
    plan_strided,
    split_pieces,
    strides,
)
from kvortex.transfer.routes import Route

AT_ONCE = 2  # groups of a layer-wise load that move while the others are planned
MAX_BLOCKS = 2048  # of kvortex.kernels.paged, which needs numba.cuda to import


class Planner:
    """What plans of an executor have in common.

    Parameters
    ----------
    fragments : (F, 4) int64
        Of the layout; (0, 4) where there is none.
    layer_offsets : (L + 1,) int64
        Of the layout; (1,) where there is none.
    allocations : (F,) int64
        First address of the allocation that holds each fragment in all blocks; -1 for none.
    max_pitch
        Bytes from one line of a 2D DMA to the next, at most.
    pool
    streams, buffers
        That copies are dealt to, and staging buffers.

    Attributes
    ----------
    pieces : (P, 4) int64
        Of all fragments.
    buffer_bytes, half_bytes
        Of a staging buffer, and of one of the two halves of all of them; 0 until there are any.
    """

    buffer_bytes = half_bytes = 0

    def __init__(
        self,
        fragments: Int64s,
        layer_offsets: Int64s,
        allocations: Int64s,
        max_pitch: int,
        pool: Pool,
        streams: int,
        buffers: int,
    ) -> None:
        self._fragments, self._layer_offsets, self._allocations = fragments, layer_offsets, allocations
        self._pool, self._streams, self._buffers = pool, streams, buffers
        self._runs = strides(fragments, max_pitch, allocations)
        self.pieces = split_pieces(cut_layers(fragments, layer_offsets))
        self._sections: dict[tuple[int, bool], Sections] = {}  # by groups, and whether some are joined
        # Those of layer-wise loads: the first groups, the others, and how many layers the first ones have.
        self._first: dict[int, tuple[Sections, Sections, int]] = {}

    @property
    def rectangle_bytes(self) -> int:
        """That a 2D DMA of a record moves, on average."""
        return int(self._runs[:, BYTES] @ self._runs[:, LINES_OF_RUN]) // max(1, len(self._runs))

    def sections(self, count: int, *, joined: bool) -> Sections:
        """Layers in so many groups, of which some are joined."""
        key = count, joined
        if key not in self._sections:  # two threads may both do it, to the same end
            limit = min(self.buffer_bytes, self.half_bytes) or None
            edges = group_layers(self._layer_offsets, count)
            joint = join_groups(edges) if joined else edges
            self._sections[key] = cut_sections(self.pieces, self._layer_offsets, joint, limit)
        return self._sections[key]

    def first_sections(self, count: int) -> tuple[Sections, Sections, int]:
        """The first ``AT_ONCE`` of joined groups, the others, and how many layers the first ones have."""
        if count not in self._first:
            whole = self.sections(count, joined=True)
            layers = int(np.count_nonzero(whole.group_of < AT_ONCE))
            self._first[count] = *split_sections(whole, AT_ONCE), layers
        return self._first[count]

    def layered(self, route: Route, records: Ordered, sections: Sections, ctas: int) -> Plan:
        """Layer by layer, by copies alone, staged, or with ``ctas`` of a resident kernel."""
        if route is Route.DIRECT:
            return plan_direct_layers(records, self._fragments[0], sections, self._pool, self._streams)
        size = self.half_bytes if ctas else self.buffer_bytes
        return plan_layers(records, sections, self._pool, size, MAX_BLOCKS, ctas=ctas)

    def whole(self, route: Route, blocks: Int64s, slots: Int64s, *, one_call: bool = True, **resident: Any) -> Plan:
        """All layers at once.

        Parameters
        ----------
        route
        blocks, slots : (n,) int64
        one_call
            Whether a batch of copies is one call of the driver.
        **resident
            ``ctas`` and ``small``, of the resident route.
        """
        if route is Route.DIRECT:
            base, stride, _, size = (int(cell) for cell in self._fragments[0])
            return plan_direct(base + blocks * stride, np.full(len(blocks), size), slots, self._pool, self._streams)
        if route is Route.STRIDED:
            return plan_strided(blocks, slots, self._runs, self._pool, self._streams)
        if route is Route.BATCHED:
            fragments, where = self._fragments, self._allocations
            return plan_batched(blocks, slots, fragments, where, self._pool, self._buffers, one_call=one_call)
        if route is Route.MAPPED:
            return plan_mapped(blocks, slots, self.pieces, self._pool, MAX_BLOCKS)
        if route is Route.RESIDENT:
            return plan_staged(blocks, slots, self.pieces, self._pool, self.half_bytes, 2, MAX_BLOCKS, **resident)
        return plan_staged(blocks, slots, self.pieces, self._pool, self.buffer_bytes, self._buffers, MAX_BLOCKS)
