"""Coded records on a GPU: launches that code pages into staging buffers, or decode them from there, and one DMA a chunk.

A chunk has launches on its buffer's stream, each a row of a kernel, its grid and its parameters (:mod:`kvortex.transfer.plan`),
and copies between the buffer and slots. What a codec launches is all that a :class:`DeviceCoder` has of its own
(:mod:`kvortex.transfer.coded.coders`).

A slot holds ``codec.slot_bytes``, with zeros behind a record that is shorter. A save cannot know how long its records become,
and zeros belong to them, so it moves whole slots. A load knows it, so it moves as much as the longest of neighbours needs, and
no zeros, which add nothing to a digest either. Loads in groups of layers are in :mod:`kvortex.transfer.coded.layers`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from kvortex.codecs import Codec
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import ConfigError, DeviceError
from kvortex.transfer.executor import Direction
from kvortex.transfer.plan import (
    ABSOLUTE,
    ARGUMENTS,
    BUFFER,
    CHUNK_COLUMNS,
    COPY_BYTES,
    COUNTER,
    CTAS,
    DEVICE_SIDE,
    FIRST,
    FIRST_BLOCK,
    FIRST_COPY,
    FIRST_LAUNCH,
    HOST_PITCH,
    HOST_SIDE,
    KERNEL,
    LAST,
    LAUNCH_COLUMNS,
    LINES,
    N_BLOCKS,
    N_COPIES,
    N_LAUNCHES,
    N_PIECES,
    PITCH,
    RELATIVE,
    SUMS,
    THREADS,
    Int64s,
    Plan,
    Pool,
    empty_copies,
    even,
    neighbours,
    ramp,
)

Parameter = tuple[int, Any]  # one of the bases of a plan, and what is added to it: a number, or one for each chunk
READ_PIECE, READ_THREADS = 4096, 256  # of kvortex.kernels.coded_read, which needs numba.cuda to import
_COPY_STEP = 512  # bytes; lines of copies are multiples of that


def plan_coded(ids: Int64s, slots: Int64s, used: Int64s, pool: Pool, room: int, starts: Int64s) -> Plan:
    """A transfer of coded records through staging buffers, without its launches.

    Parameters
    ----------
    ids : (m,) int64
        What kernels read of the records, in their order: pages, say.
    slots : (n,) int64
        Of the records; they ascend.
    used : (n,) int64
        Bytes that have to cross the link of each.
    pool
    room
        Bytes of a record at most, and from one to the next in a staging buffer.
    starts : (c,) int64
        First records of chunks.
    """
    heads, lengths, chunk_of = neighbours(slots, starts, pool)
    widths = np.minimum(-(-np.maximum.reduceat(used, heads) // _COPY_STEP) * _COPY_STEP, room)
    joined = (widths == room) & (room == pool.slot_bytes)  # neighbours without a gap on either side
    copies = empty_copies(len(heads))
    copies[:, DEVICE_SIDE] = (heads - starts[chunk_of]) * room
    copies[:, HOST_SIDE] = pool.address + slots[heads] * pool.slot_bytes
    copies[:, COPY_BYTES] = np.where(joined, lengths * room, widths)
    copies[:, LINES] = np.where(joined, 1, lengths)
    copies[:, PITCH], copies[:, HOST_PITCH] = room, pool.slot_bytes
    chunks = np.zeros((len(starts), CHUNK_COLUMNS), np.int64)
    chunks[:, FIRST_BLOCK] = starts
    chunks[:, N_BLOCKS] = np.diff(np.append(starts, len(slots)))
    chunks[:, N_PIECES] = 1  # it has a staging buffer
    chunks[:, FIRST_COPY] = np.searchsorted(heads, starts)
    chunks[:, N_COPIES] = np.diff(np.append(chunks[:, FIRST_COPY], len(heads)))
    nbytes = int((copies[:, COPY_BYTES] * copies[:, LINES]).sum())
    return Plan(ids.astype(np.int32), chunks, copies, nbytes, room)


class DeviceCoder(ABC):
    """What an executor of a GPU needs of a codec. Immutable once it is open.

    Parameters
    ----------
    device
    codec
        Of whose records slots hold ``codec.slot_bytes`` each.
    pool
    kernel
        Gives the handle of a kernel by its name.
    numbers
        Address of the digests' table in VRAM; 0 where nothing is digested.

    Attributes
    ----------
    works : list of int
        Addresses of what belongs to each staging buffer besides, once it is open.
    most_ctas : (int, int)
        Of one launch of a save, and of a load. May be changed between transfers, as measurements do.
    """

    kernels: ClassVar[tuple[str, ...]]
    # CTAs a multiprocessor, of a save and of a load, from a compute capability on: as many as find room at once, of kernels
    # that code. A third more made a wave of their own, in which two thirds of the GPU had nothing to do: 1,631 and not 1,918
    # GB/s of blocks by k4v3 were decoded (an H200). Registers decide it (kvortex.kernels.build), and from 12.0 on, with
    # 100 KiB of it a multiprocessor, shared memory.
    ctas_each: ClassVar[dict[tuple[int, int], tuple[int, int]]] = {(0, 0): (2, 2), (9, 0): (3, 3), (12, 0): (2, 2)}
    work_bytes = 0  # of each record of a chunk

    def __init__(
        self, device: CudaDevice, codec: Codec, pool: Pool, kernel: Callable[[str], int], numbers: int
    ) -> None:
        self.codec, self._device, self._pool, self._numbers = codec, device, pool, numbers
        self.works: list[int] = []
        self._held: list[Any] = []
        self._kernels = {name: kernel(name) for name in self.kernels if numbers or not name.endswith("_digest")}
        save, load = self.ctas_each[max(least for least in self.ctas_each if least <= device.compute_capability)]
        self.most_ctas = save * device.multiprocessors, load * device.multiprocessors

    def open(self, buffers: int, buffer_bytes: int) -> None:
        """Takes what belongs to each of so many staging buffers.

        Raises
        ------
        ConfigError
            A buffer does not hold a record, and these kernels write whole ones.
        """
        room = self.codec.slot_bytes
        self._per_chunk, self._buffers, self._buffer_bytes = buffer_bytes // room, buffers // 2, buffer_bytes
        if not self._per_chunk:
            least = buffers * -(-room // READ_PIECE) * READ_PIECE
            what = f"codec = {self.codec.name!r}: a staging buffer of {buffer_bytes} bytes does not hold a record of {room}"
            raise ConfigError(f"{what}; set gpu_pool_size_bytes to {least} or more")
        nbytes = self._per_chunk * self.work_bytes
        first = self._hold(np.zeros(buffers * nbytes, np.uint8)) if nbytes else 0
        self.works = [first + at * nbytes for at in range(buffers)]

    def _hold(self, array: Any) -> int:
        """Address of a copy in VRAM, as long as this is open."""
        self._held.append(self._device.allocate(array.nbytes))
        self._held[-1].write(array.reshape(-1).view(np.uint8))
        return int(self._held[-1].address)

    def plan(
        self, direction: Direction, blocks: Int64s, slots: Int64s, busy: bool, parts: Int64s | None = None
    ) -> Plan:
        """A transfer of pages to slots or back, no slot twice. ``busy``: a model computes meanwhile.

        ``parts`` : (n,) int64, where some slots hold a part of a page as it is: its number, or -1; None where none does.
        """
        order = np.argsort(slots)
        blocks, slots = blocks[order], slots[order]
        parts = None if parts is None else parts[order]
        save, room = direction is Direction.SAVE, self.codec.slot_bytes
        if busy:  # then chunks begin together, when a kernel of the model ends
            starts = even(len(slots), self._per_chunk, self._buffers)
        else:  # the link is not to wait for a long first launch, nor the end for a long last one
            starts = ramp(len(slots), self._per_chunk, FIRST if save else LAST)
        used = np.full(len(slots), room) if save else self._used(slots, parts)
        plan = plan_coded(self._ids(blocks, parts), slots, used, self._pool, room, starts)
        chunks = plan.chunks
        rows = self._rows(save, chunks[:, FIRST_BLOCK], chunks[:, N_BLOCKS], self.most_ctas[not save])
        chunks[:, N_LAUNCHES], chunks[:, FIRST_LAUNCH] = len(rows), np.arange(len(chunks)) * len(rows)
        launches = np.stack(rows, axis=1).reshape(-1, LAUNCH_COLUMNS)
        return Plan(plan.ids, chunks, plan.copies, plan.nbytes, room, order=order, launches=launches)

    @abstractmethod
    def _ids(self, blocks: Int64s, parts: Int64s | None) -> Int64s:
        """What kernels read of records, one behind another."""

    @abstractmethod
    def _used(self, slots: Int64s, parts: Int64s | None) -> Int64s:
        """(n,): bytes of the records in slots, which nobody writes, without zeros behind them."""

    @abstractmethod
    def _rows(self, save: bool, first: Int64s, count: Int64s, most: int) -> list[Int64s]:
        """What each chunk launches, one behind another; each (c, LAUNCH_COLUMNS), of :meth:`_row`.

        ``first`` and ``count`` are (c,): records of each chunk. ``most`` CTAs are as many as one launch may have.
        """

    def _row(self, kernel: str, ctas: Int64s, threads: int, *parameters: Parameter) -> Int64s:
        """A launch of each chunk, by a kernel whose last parameter is a counter of shares."""
        made = np.zeros((len(ctas), LAUNCH_COLUMNS), np.int64)
        made[:, KERNEL], made[:, CTAS], made[:, THREADS] = self._kernels[kernel], ctas, threads
        for at, (base, value) in enumerate((*parameters, (COUNTER, 0))):
            made[:, RELATIVE] |= base << 4 * at
            made[:, ARGUMENTS + at] = value
        return made

    def _read(
        self, first: Int64s, count: Int64s, most: int, pitch: Any, begin: Any, end: Any, shift: Any, *, headed: bool
    ) -> Int64s:
        """A launch of :func:`kvortex.kernels.coded_read.read_records`; numbers, or one for each chunk."""
        ctas = np.clip(-(-count * -(-(end - begin) // READ_PIECE) // (READ_THREADS // 32)), 1, most)
        fixed = (BUFFER, 0), (ABSOLUTE, pitch), (ABSOLUTE, count), (ABSOLUTE, self._numbers), self._sums(first)
        span = (ABSOLUTE, begin), (ABSOLUTE, end), (ABSOLUTE, shift), (ABSOLUTE, int(headed))
        return self._row("read_records", ctas, READ_THREADS, *fixed, *span)

    def _sums(self, first: Int64s) -> Parameter:
        return (SUMS, 16 * first) if self._numbers else (ABSOLUTE, 0)

    def close(self) -> None:
        """Gives the VRAM back. Nothing may be in flight. A second call does nothing."""
        while self._held:
            with contextlib.suppress(DeviceError):
                self._held.pop().free()
