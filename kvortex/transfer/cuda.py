"""The executor of a GPU: gather kernel, staging buffer and DMA on several streams, issued by one compiled call."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from kvortex.codecs import Codec
from kvortex.devices import asking
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.devices.streams import cuda_stream_handle
from kvortex.errors import ArgumentError, ConfigError, DeviceError
from kvortex.memory.arena import SLOT_ALIGNMENT
from kvortex.memory.ids import IdPool
from kvortex.memory.staging import StagingRing
from kvortex.transfer._layers import load_compiled as load_layers
from kvortex.transfer.coded.coders import coder_for
from kvortex.transfer.coded.layers import LayeredCoder, LayeredLoad
from kvortex.transfer.cuda_completion import CudaCompletion, CudaMark
from kvortex.transfer.cuda_digests import ON_ONE_STREAM, Digests
from kvortex.transfer.digesting import Digesting
from kvortex.transfer.executor import Completion, Direction
from kvortex.transfer.issue.cells import COUNTER_BYTES, NO_STREAM
from kvortex.transfer.issue.resident import FLAG_BYTES
from kvortex.transfer.lane import Lane, are_few
from kvortex.transfer.layer_load import LayerLoad
from kvortex.transfer.layers import Ordered, Sections, group_count, in_order, split_groups
from kvortex.transfer.layerwise import LayerSave
from kvortex.transfer.lending import Lender
from kvortex.transfer.plan import FIRST, LAST, NONE, OFFSET, Int64s, Plan, Pool, in_one_chunk, plan_direct
from kvortex.transfer.planner import AT_ONCE, Planner
from kvortex.transfer.profiles.profile import Profile, most_resident_ctas
from kvortex.transfer.routes import Ability, Route, choose, tabulate

LAYER_CTAS = 4  # times the CTAs of a resident kernel, for layers that a model waits for: nothing else hides their scatter


def launches_block() -> bool:
    """Whether the driver was told to return from a launch only when its kernel has ended."""
    return os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0")


def resident_kernels_can_run(device: CudaDevice) -> bool:
    """Whether launches return before their kernels end, which a resident kernel needs: its copies are issued after it."""
    return device.has_stream_flags and not launches_block()


def _allocations(device: CudaDevice, fragments: Int64s, num_blocks: int) -> Int64s:
    """(F,) int64: for each fragment the allocation that holds it in all blocks, by its first address; -1 for none."""
    found = np.full(len(fragments), -1, np.int64)
    known: tuple[int, int] | None = None
    for at, (base, stride, _, nbytes) in enumerate(fragments.tolist()):
        end = base + stride * (num_blocks - 1) + nbytes
        if known is None or not (known[0] <= base and end <= known[0] + known[1]):
            known = device.allocation(base)
        if known is not None and end <= known[0] + known[1]:
            found[at] = known[0]
    return found


class CudaExecutor(Lender):
    """Moves blocks through staging buffers, or by DMA alone where a record is one long contiguous piece.

    Parameters
    ----------
    device
    fragments : (F, 4) int64
        Of the layout; (0, 4) where there is none.
    layer_offsets : (L + 1,) int64
        Of the layout; (1,) where there is none.
    num_blocks
        Of the layout.
    pool
        The pinned slots.
    gpu_budget
        Bytes of VRAM for staging buffers.
    profile
        What transfers are shaped by; its buffers have equal parts of the budget.
    route
        For all transfers of blocks; None to choose for each.
    beside_compute
        Whether a model computes while blocks move; None to ask the caller's stream each time.
    digests
        Whether blocks are digested while they move.
    codec
        Whose records slots hold, of blocks of the layout, which then are all staged; None for the blocks themselves.
    link_shares
        Of the link's rate, that staged saves and loads take beside a computing model.

    Attributes
    ----------
    route, beside_compute, resident_ctas
        May be changed between transfers, as measurements do. ``resident_ctas`` are two numbers of CTAs of a resident kernel,
        with the GPU idle and beside a computing model.
    """

    def __init__(
        self,
        device: CudaDevice,
        fragments: Int64s,
        layer_offsets: Int64s,
        num_blocks: int,
        pool: Pool,
        gpu_budget: int,
        profile: Profile,
        route: Route | None = None,
        beside_compute: bool | None = None,
        digests: bool = False,
        codec: Codec | None = None,
        link_shares: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(device)
        self._codec = codec
        self._coder: LayeredCoder | None = None
        self.beside_compute = beside_compute
        self._link_shares = link_shares
        self.resident_ctas = profile.resident_ctas, profile.resident_ctas_beside
        if pool.slot_bytes > device.max_pitch:  # then no 2D DMA reaches from one slot into the next
            pool = dataclasses.replace(pool, segment_slots=1)
        self._profile, self._pool, self._count = profile, pool, profile.streams
        self._fragments, self._layer_offsets = fragments, layer_offsets
        load_layers()
        self._staging: StagingRing | None = None
        self._table: Any = None
        self._flags: Any = None
        self._digests = Digests(digests)
        self._depth = max(self._count, profile.buffers)
        lie = _allocations(device, fragments, num_blocks)
        self._planner = Planner(fragments, layer_offsets, lie, device.max_pitch, pool, self._count, self._depth)
        self._batches = cu.has_batched_copies()
        # A record that is one long piece needs no kernel, whatever else is asked for.
        one_piece = len(fragments) == 1 and int(fragments[0, 3]) >= profile.copy_bytes
        self.route = Route.STAGED if codec is not None else Route.DIRECT if one_piece else route
        if self.route is Route.RESIDENT and not resident_kernels_can_run(device):
            why = "CUDA_LAUNCH_BLOCKING is set" if launches_block() else "this GPU's streams cannot wait for memory"
            raise ConfigError(f"transfer_route = 'resident': its kernel would wait for ever, since {why}; use 'auto'")
        try:
            self._open(gpu_budget)
            self._table_of_routes = tabulate(profile.rankings, self._ability())
        except BaseException:
            self.close()
            raise

    def _open(self, gpu_budget: int) -> None:
        staged = len(self._fragments) > 0 and self.route is not Route.DIRECT
        depth, pieces = self._depth, self._planner.pieces
        buffers, table, flags, counters, flag = [0] * (2 * depth), 0, 0, 0, 0
        kernels = {direction: (0, 0) for direction in Direction}
        self._ids = IdPool(self.device)
        if len(pieces):
            self._table = self.device.allocate(pieces.nbytes)
            self._table.write(pieces)
            table = self._table.address
        # The table is for records of any length that a slot takes.
        self._digests.open(self.device, self._pool.slot_bytes, self._kernel if self._codec is None else None)
        suffix = "_digest" if self._digests.summed else ""
        if staged:
            self._staging = StagingRing(self.device, gpu_budget, 2 * depth)
            buffers = self._staging.addresses
        if staged or self._digests.summed:
            # Of each direction's two buffers flags, of each of its streams a counter, and a flag of loads that are read early.
            flags_bytes, counters_bytes = 2 * 2 * 2 * FLAG_BYTES, 2 * depth * COUNTER_BYTES
            self._flags = self.device.allocate(flags_bytes + counters_bytes + FLAG_BYTES)
            self._flags.write(np.zeros(self._flags.nbytes, np.uint8))
            flags, counters = self._flags.address, self._flags.address + flags_bytes
            if self._digests.summed and self._codec is None and self.device.has_stream_flags:
                flag = counters + counters_bytes
        works: list[int] | None = None
        if staged and self._codec is not None and self._staging is not None:
            known = self._pool, self._kernel, self._digests.numbers
            self._coder = coder_for(self.device, self._codec, self._fragments, *known)
            self._coder.open(2 * depth, self._staging.buffer_bytes)
            works = self._coder.works
        elif staged:
            kernels = {
                Direction.SAVE: (self._kernel("gather" + suffix), self._kernel("gather_resident" + suffix)),
                Direction.LOAD: (self._kernel("scatter" + suffix), self._kernel("scatter_resident" + suffix)),
            }
        for at, direction in enumerate(Direction):
            mine = buffers[at * depth : (at + 1) * depth]
            my_flags = flags + 2 * 2 * FLAG_BYTES * at
            self._lanes[direction] = Lane(
                self.device,
                direction,
                *kernels[direction],
                self._count,
                mine,
                self._halves(mine),
                self._profile.staged_ctas,
                my_flags,
                table,
                pieces[:, OFFSET],
                counters + depth * COUNTER_BYTES * at,
                None if works is None else works[at * depth : (at + 1) * depth],
                self._staging.buffer_bytes if self._staging is not None else 0,
                self._profile.link_rate,
                self._link_shares[at],
                flag if direction is Direction.LOAD else 0,
            )

    def _halves(self, buffers: list[int]) -> list[int]:
        """The staging buffers of a direction as a resident kernel uses them: two, so that a DMA is as long as can be.

        From one DMA to the next the link stands still for microseconds, and with flags in between for longer. One buffer on
        the link and one that is filled, or emptied, are enough.
        """
        if self._staging is None:
            return buffers
        nbytes = len(buffers) * self._staging.buffer_bytes
        half = nbytes // 2 // SLOT_ALIGNMENT * SLOT_ALIGNMENT
        self._planner.buffer_bytes, self._planner.half_bytes = self._staging.buffer_bytes, half or nbytes
        return [buffers[0], buffers[0] + half] if half else buffers[:1]

    def _ability(self) -> Ability:
        staged = self._depth * self._staging.buffer_bytes if self._staging is not None else 0
        return Ability(
            fragment_bytes=int(self._layer_offsets[-1]) // max(1, len(self._fragments)),
            strided=self._planner.rectangle_bytes >= self._profile.copy_bytes,
            batched=self._batches,
            resident=resident_kernels_can_run(self.device),
            deep=self._profile.is_deep(staged),
        )

    def prepare_blocks(
        self,
        direction: Direction,
        blocks: Int64s,
        slots: Int64s,
        stream: Any,
        layerwise: bool = False,
        parts: Int64s | None = None,
    ) -> Completion:
        mark = stream if isinstance(stream, CudaMark) else None
        caller = NO_STREAM if mark is not None else cuda_stream_handle(stream)
        nbytes = len(blocks) * int(self._layer_offsets[-1])
        in_groups = layerwise and direction is Direction.SAVE
        # Who saves layer by layer computes meanwhile, unless he says that he does not.
        busy = self.beside_compute is not False if in_groups else self._is_busy(caller, mark)
        if self._coder is not None:
            if layerwise and not in_groups:
                layered = self._coder.layered(blocks, slots, busy, parts, self._layer_offsets, self._profile.least)
                if layered is not None:
                    return self._coded_layers(self._coder, layered, caller, mark)
            plan = self._coder.plan(direction, blocks, slots, busy, parts)
            return self._prepare_coded(self._coder, direction, plan, caller, mark, in_groups, busy)
        assert parts is None, "parts of blocks are a codec's"
        table = self._table_of_routes
        route = self.route or choose(table, direction, nbytes, beside_compute=busy, layerwise=layerwise)
        num_layers = len(self._layer_offsets) - 1
        if layerwise and route in (Route.RESIDENT, Route.STAGED, Route.DIRECT):
            # A group of a save is submitted by itself, which costs the caller time: few are better, though the last ends later.
            records = in_order(blocks, slots)
            runs = len(blocks) if in_groups or route is Route.DIRECT else records.runs
            record_bytes, least = int(self._layer_offsets[-1]), self._profile.least
            count = group_count(num_layers, record_bytes, len(blocks), runs, least)
            sections = self._planner.sections(count, joined=not in_groups and route is not Route.DIRECT)
            # A mark is used once, and the parts of a load may be on different streams.
            if not in_groups and route is not Route.DIRECT and mark is None and len(sections.ends) > 2 * AT_ONCE:
                return self._layer_load(route, blocks, records, busy, count, caller)
            plan = self._planner.layered(route, records, sections, self._layer_ctas(route, busy))
            if in_groups:
                edges = sections.first_pieces[[0, *sections.ends.tolist()]]
                return self._layer_save(split_groups(plan), route, busy, sections.group_of, blocks, edges)
            digests = self._digesting(route, blocks, 0, len(self._planner.pieces)), self._sizes(blocks)
            return CudaCompletion(self, direction, plan, caller, route, sections.group_of, *digests, mark)
        plan, edges = self._plan(direction, route, blocks, slots, busy), np.array([0, len(self._planner.pieces)])
        if in_groups:  # the other routes take all layers at once
            return self._layer_save([plan], route, busy, np.zeros(num_layers, np.int64), blocks, edges)
        digesting = self._digesting(route, blocks, *edges.tolist())
        plan, digesting = self._early(direction, route, plan, digesting, caller, mark, busy)
        digests = digesting, self._sizes(blocks)
        return CudaCompletion(self, direction, plan, caller, route, None, *digests, mark, beside_compute=busy)

    def _prepare_coded(
        self,
        coder: LayeredCoder,
        direction: Direction,
        plan: Plan,
        caller: int,
        mark: CudaMark | None,
        in_groups: bool,
        busy: bool,
    ) -> Completion:
        """Through a codec, which takes whole records: all layers are one group."""
        sizes = np.full(len(plan.order), coder.codec.slot_bytes)
        digesting = self._digests.of_records(len(plan.order))
        if not in_groups:
            known = caller, Route.STAGED, None, digesting, sizes, mark
            return CudaCompletion(self, direction, plan, *known, beside_compute=busy)
        part = CudaCompletion(self, direction, plan, NO_STREAM, Route.STAGED, None, digesting, beside_compute=busy)
        try:
            group_of = np.zeros(len(self._layer_offsets) - 1, np.int64)
            return LayerSave([part], group_of, self._digests.sizes(sizes))
        except BaseException:
            part.cancel()
            raise

    def _coded_layers(self, coder: LayeredCoder, layered: LayeredLoad, caller: int, mark: CudaMark | None) -> Completion:
        """The first group of layers, and how the others are prepared; or all at once, behind a mark."""
        group_of, sizes = layered.group_of, np.full(layered.records, coder.codec.slot_bytes)
        if mark is not None:  # it is used once
            digesting = self._digests.of_records(layered.records)
            plan = layered.whole()
            return CudaCompletion(self, Direction.LOAD, plan, caller, Route.STAGED, group_of, digesting, sizes, mark)

        def part(plan: Plan, groups: Int64s, behind: CudaCompletion | None = None) -> CudaCompletion:
            digesting = self._digests.of_records(layered.records)
            return CudaCompletion(self, Direction.LOAD, plan, caller, Route.STAGED, groups, digesting, behind=behind)

        first, layers = part(layered.first(), group_of), int(np.count_nonzero(group_of == 0))
        return self._goes_on(first, lambda: part(layered.rest(), group_of - 1, first), layers, sizes)

    def _sizes(self, blocks: Int64s) -> Int64s:
        return np.full(len(blocks), self._layer_offsets[-1])

    def _digesting(self, route: Route, blocks: Int64s, first: int, last: int, whole: bool = True) -> Digesting | None:
        table = self._table.address if self._table is not None else 0
        return self._digests.of_blocks(route, blocks, table, first, last, whole=whole)

    def _layer_save(
        self, plans: list[Plan], route: Route, busy: bool, group_of: Int64s, blocks: Int64s, edges: Int64s
    ) -> LayerSave:
        """``edges`` are the first pieces of each group, and their number."""
        parts: list[CudaCompletion] = []
        try:
            for plan, first, last in zip(plans, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                digesting = self._digesting(route, blocks, first, last, whole=False)
                known = NO_STREAM, route, None, digesting
                parts.append(CudaCompletion(self, Direction.SAVE, plan, *known, beside_compute=busy))
            return LayerSave(parts, group_of, self._digests.sizes(self._sizes(blocks)))
        except BaseException:
            for part in parts:
                part.cancel()
            raise

    def _layer_load(
        self, route: Route, blocks: Int64s, records: Ordered, busy: bool, count: int, caller: int
    ) -> LayerLoad:
        """Its first groups, and how the others are prepared."""
        cuts, ctas = self._planner.first_sections(count), self._layer_ctas(route, busy)

        def part(cut: Sections, behind: CudaCompletion | None = None) -> CudaCompletion:
            plan = self._planner.layered(route, records, cut, ctas)
            edges = int(cut.first_pieces[0]), int(cut.first_pieces[-1])
            digesting = self._digesting(route, blocks, *edges, whole=False)
            return CudaCompletion(self, Direction.LOAD, plan, caller, route, cut.group_of, digesting, behind=behind)

        first = part(cuts[0])
        return self._goes_on(first, lambda: part(cuts[1], first), cuts[2], self._sizes(blocks))

    def _goes_on(self, first: CudaCompletion, rest: Callable[[], CudaCompletion], layers: int, sizes: Int64s) -> LayerLoad:
        """A load whose first part, of so many layers, is prepared; ``rest`` prepares the other."""
        try:
            return LayerLoad(first, rest, layers, self._digests.sizes(sizes))
        except BaseException:
            first.cancel()
            raise

    def _layer_ctas(self, route: Route, busy: bool) -> int:
        """Of a resident kernel, and 0 of other routes."""
        ctas = self.resident_ctas[busy] if route is Route.RESIDENT else 0
        if ctas and not busy:
            ctas = max(ctas, min(LAYER_CTAS * ctas, most_resident_ctas(self.device.multiprocessors) // 2))
        return ctas

    def _plan(self, direction: Direction, route: Route, blocks: Int64s, slots: Int64s, busy: bool) -> Plan:
        resident: dict[str, int] = {}
        if route is Route.RESIDENT:
            small = LAST
            if direction is Direction.SAVE:  # the link has something to do where another one has not ended yet
                small = NONE if self._ask(cu.STREAM_QUERY, self._lanes[direction].copy_stream) == asking.NOT_READY else FIRST
            resident = {"ctas": self.resident_ctas[busy], "small": small}
        return self._planner.whole(route, blocks, slots, one_call=self._batches, **resident)

    def _is_busy(self, caller: int, mark: CudaMark | None) -> bool:
        """Whether a model is computing: as the user says, or mostly when the caller's stream has work on it."""
        return self.beside_compute if self.beside_compute is not None else self._has_work(caller, mark)

    def _has_work(self, caller: int, mark: CudaMark | None) -> bool:
        """Whether there is something ahead on the caller's stream."""
        return mark.busy() if mark is not None else self._ask(cu.STREAM_QUERY, caller) == asking.NOT_READY

    def _early(
        self,
        direction: Direction,
        route: Route,
        plan: Plan,
        digesting: Digesting | None,
        caller: int,
        mark: CudaMark | None,
        busy: bool | None = None,
    ) -> tuple[Plan, Digesting | None]:
        """A transfer of copies alone, and what is digested of it: as a load that is read early, where it may be. ``busy`` is
        what :meth:`_is_busy` says, if it was asked."""
        if digesting is None or not digesting.apart or direction is not Direction.LOAD or route not in ON_ONE_STREAM:
            return plan, digesting
        if not self._lanes[direction].reads_early or (self._is_busy(caller, mark) if busy is None else busy):
            return plan, digesting
        if not self._may_read_early(direction, plan, caller, mark):
            return plan, digesting
        return in_one_chunk(plan), dataclasses.replace(digesting, early=True)

    def _may_read_early(self, direction: Direction, plan: Plan, caller: int, mark: CudaMark | None) -> bool:
        """Of a load that is not beside a model: whether a kernel may wait on the GPU for what its DMAs bring. They must be few,
        and next on their engine: nothing else may be loading, nor anything be ahead of this on its caller's stream."""
        lane = self._lanes[direction]
        if not are_few(1, len(plan.copies)) or not lane.idle:
            return False
        busy = self.beside_compute is not None and self._has_work(caller, mark)  # where that is None it has been asked
        return not busy and not self.ask_streams(lane.ordinary_streams)

    def prepare_buffers(
        self, direction: Direction, addresses: Int64s, sizes: Int64s, slots: Int64s, stream: Any
    ) -> CudaCompletion:
        plan = plan_direct(addresses, sizes, slots, self._pool, self._count, one_tensor=False)
        mark = stream if isinstance(stream, CudaMark) else None
        caller = NO_STREAM if mark is not None else cuda_stream_handle(stream)
        digesting = self._digests.of_buffers(addresses, sizes)
        plan, digesting = self._early(direction, Route.DIRECT, plan, digesting, caller, mark)
        return CudaCompletion(self, direction, plan, caller, Route.DIRECT, None, digesting, sizes, mark)

    def mark(self, stream: Any) -> CudaMark:
        return CudaMark(self, cuda_stream_handle(stream))

    def check_stream(self, stream: Any) -> None:
        code, status = asking.ask_capture(self._functions, int(self.device.context), cuda_stream_handle(stream))
        if code == asking.CAPTURE_IMPLICIT:
            raise ArgumentError("the default stream cannot be waited for while another stream is being captured; pass stream=")
        cu.check((code,), "the stream of the caller")
        if status:
            raise ArgumentError("the stream is being captured into a CUDA graph; a transfer cannot be part of one")

    def close(self) -> None:
        super().close()
        if self._staging is not None:
            self._staging.close()
        if self._coder is not None:
            self._coder.close()
        self._digests.close()
        for buffer in (self._table, self._flags):
            if buffer is not None:
                with contextlib.suppress(DeviceError):
                    buffer.free()
