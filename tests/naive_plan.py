"""What a plan does, one byte range at a time: the GPU that the planner has in mind, with every border guarded."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvortex.transfer.plan import (
    BASE,
    BYTES,
    COPY_BYTES,
    DEVICE_SIDE,
    FIRST_BLOCK,
    FIRST_COPY,
    FIRST_PIECE,
    HOST_PITCH,
    HOST_SIDE,
    INSTEAD,
    LINES,
    N_BLOCKS,
    N_COPIES,
    N_PIECES,
    OFFSET,
    PITCH,
    STRIDE,
    Int64s,
    Plan,
    Pool,
)

Bytes = npt.NDArray[np.uint8]
VRAM = 1 << 33  # address of the first byte of device memory


@dataclass
class Machine:
    """Device memory from address ``VRAM`` on, a host pool, and one staging buffer a stream.

    ``host_writes`` and ``device_writes`` count how often each byte was written.
    """

    vram: Bytes
    host: Bytes
    pool: Pool
    pieces: Int64s
    buffer_bytes: int
    streams: int
    turn: int = 0
    staging: list[Bytes] = field(init=False)
    host_writes: npt.NDArray[np.int64] = field(init=False)
    device_writes: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        left = np.random.default_rng(9)  # by other transfers: nothing that a plan did not put there may leave a buffer
        self.staging = [left.integers(1, 256, self.buffer_bytes, np.uint8) for _ in range(self.streams)]
        self.host_writes = np.zeros(len(self.host), np.int64)
        self.device_writes = np.zeros(len(self.vram), np.int64)

    def run(self, plan: Plan, *, to_host: bool) -> None:
        """Executes every chunk on its stream; chunk after chunk, as any order that keeps each stream's order would."""
        for chunk in plan.chunks.tolist():
            stream = self.turn % self.streams
            self.turn += 1
            copies = plan.copies[chunk[FIRST_COPY] : chunk[FIRST_COPY] + chunk[N_COPIES]].tolist()
            assert len(copies) == (0 if plan.batch.size else chunk[N_COPIES]) and (chunk[N_COPIES] or chunk[INSTEAD])
            if not chunk[N_PIECES]:
                if plan.batch.size:
                    rows = plan.batch[:, chunk[FIRST_COPY] : chunk[FIRST_COPY] + chunk[N_COPIES]].T.tolist()
                    assert len(rows) == chunk[N_COPIES] and plan.batch.flags.c_contiguous
                    for device, host, nbytes in rows:
                        self._dma(self.vram, device - VRAM, host, nbytes, self.device_writes, to_host)
                for copy in copies:
                    for line in range(copy[LINES]):
                        at, host = copy[DEVICE_SIDE] - VRAM + line * copy[PITCH], copy[HOST_SIDE] + line * copy[HOST_PITCH]
                        self._dma(self.vram, at, host, copy[COPY_BYTES], self.device_writes, to_host)
                continue
            if chunk[INSTEAD]:
                assert not copies
                self._mapped(plan, chunk, to_host)
                continue
            buffer = self.staging[stream]
            if to_host:
                self._kernel(plan, chunk, buffer, to_host)
            for copy in copies:
                for line in range(copy[LINES]):
                    at, host = copy[DEVICE_SIDE] + line * copy[PITCH], copy[HOST_SIDE] + line * copy[HOST_PITCH]
                    self._dma(buffer, at, host, copy[COPY_BYTES], None, to_host)
            if not to_host:
                self._kernel(plan, chunk, buffer, to_host)

    def _kernel(self, plan: Plan, chunk: list[int], buffer: Bytes, to_host: bool) -> None:
        """The gather and scatter kernels' contract, of :mod:`kvortex.kernels.paged`."""
        blocks = plan.ids[chunk[FIRST_BLOCK] : chunk[FIRST_BLOCK] + chunk[N_BLOCKS]].tolist()
        pieces = self.pieces[chunk[FIRST_PIECE] : chunk[FIRST_PIECE] + chunk[N_PIECES]].tolist()
        assert len(blocks) == chunk[N_BLOCKS] > 0 and len(pieces) == chunk[N_PIECES]
        for b, block in enumerate(blocks):
            for piece in pieces:
                page = piece[BASE] + block * piece[STRIDE] - VRAM
                part = b * plan.pitch + piece[OFFSET] - pieces[0][OFFSET]
                n = piece[BYTES]
                assert 0 <= page and page + n <= len(self.vram), "a kernel leaves the pages"
                assert 0 <= part and part + n <= len(buffer), "a kernel leaves the staging buffer"
                if to_host:
                    buffer[part : part + n] = self.vram[page : page + n]
                else:
                    self.vram[page : page + n] = buffer[part : part + n]
                    self.device_writes[page : page + n] += 1

    def _mapped(self, plan: Plan, chunk: list[int], to_host: bool) -> None:
        """A kernel with slots for a staging buffer."""
        first = chunk[INSTEAD] - self.pool.address
        pieces = self.pieces[chunk[FIRST_PIECE] :][: chunk[N_PIECES]]
        part = int(pieces[-1, OFFSET] + pieces[-1, BYTES] - pieces[0, OFFSET])
        end = first + (chunk[N_BLOCKS] - 1) * self.pool.slot_bytes + part
        assert 0 <= first < end <= len(self.host), "a kernel leaves the host pool"
        segment = self.pool.segment_slots * self.pool.slot_bytes
        assert first // segment == (end - 1) // segment, "a kernel crosses from one registration into the next"
        before = self.host.copy()
        self._kernel(plan, chunk, self.host[first:end], to_host)
        if to_host:
            for b in range(chunk[N_BLOCKS]):
                for piece in pieces.tolist():
                    at = first + b * self.pool.slot_bytes + piece[OFFSET] - int(pieces[0, OFFSET])
                    self.host_writes[at : at + piece[BYTES]] += 1
        else:
            assert (self.host == before).all()

    def _dma(
        self, memory: Bytes, at: int, host: int, n: int, writes: npt.NDArray[np.int64] | None, to_host: bool
    ) -> None:
        host -= self.pool.address
        assert n > 0
        assert 0 <= at and at + n <= len(memory), "a copy leaves the device's memory"
        assert 0 <= host and host + n <= len(self.host), "a copy leaves the host pool"
        segment = self.pool.segment_slots * self.pool.slot_bytes
        assert host // segment == (host + n - 1) // segment, "a copy crosses from one registration into the next"
        if to_host:
            self.host[host : host + n] = memory[at : at + n]
            self.host_writes[host : host + n] += 1
        else:
            memory[at : at + n] = self.host[host : host + n]
            if writes is not None:
                writes[at : at + n] += 1
