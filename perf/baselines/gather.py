"""Gather into one contiguous buffer in VRAM, then one copy: what an array library's user writes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from perf import foreign
from perf.baselines.base import Baseline
from perf.clock import CudaClock
from perf.pages import LAYERS, Ids

_HOW = "of all layers at once as 8-byte elements, through one buffer in VRAM and one asynchronous copy; ids are sent each time"


class Gather(Baseline):
    """Gathers with a library's own kernel on a stream of the library's; only what is on that stream is timed."""

    fragments_first = True

    library: ClassVar[Callable[[], Any]]

    def require(self) -> None:
        self.gpu()
        self.module = self.library()

    def open(self) -> None:
        device = self.gpu()
        words = self.pages.fragment_bytes // 8
        with_pages, with_count = ((2 * LAYERS, n, words) for n in (self.pages.pages, self.pages.count))
        self.clock = CudaClock(device, self.prepare(device.ordinal, with_pages, with_count))

    @abstractmethod
    def prepare(self, ordinal: int, pages: tuple[int, ...], buffer: tuple[int, ...]) -> Any:
        """Makes arrays of int64 over the pages and for the buffer; the stream that all work goes to."""

    @abstractmethod
    def gather(self, blocks: Ids) -> None:
        """Pages to buffer to host memory."""

    @abstractmethod
    def scatter(self, blocks: Ids) -> None:
        """Host memory to buffer to pages."""

    def save(self, blocks: Ids) -> float:
        return self.clock.seconds(lambda: self.gather(blocks))

    def load(self, blocks: Ids) -> float:
        return self.clock.seconds(lambda: self.scatter(blocks))

    def close(self) -> None:
        self._pages = self._buffer = self._host = None  # views of memory that others are about to free
        super().close()


class TorchGather(Gather):
    """With torch."""

    name = "torch"
    library = staticmethod(foreign.torch)
    how = "index_select to save and index_copy_ to load, " + _HOW

    def prepare(self, ordinal: int, pages: tuple[int, ...], buffer: tuple[int, ...]) -> Any:
        torch = self.module
        self._device = torch.device("cuda", ordinal)
        whole = torch.as_tensor(self.pages.memory, device=self._device)
        self._pages = whole.view(torch.int64).view(pages)
        self._buffer = torch.empty(buffer, dtype=torch.int64, device=self._device)
        self._host = torch.from_numpy(self.host.view(0, self.nbytes).view(np.int64).reshape(buffer))
        self._stream = torch.cuda.Stream(self._device)
        return self._stream

    def gather(self, blocks: Ids) -> None:
        with self.module.cuda.stream(self._stream):
            self.module.index_select(self._pages, 1, self._ids(blocks), out=self._buffer)
            self._host.copy_(self._buffer, non_blocking=True)

    def scatter(self, blocks: Ids) -> None:
        with self.module.cuda.stream(self._stream):
            self._buffer.copy_(self._host, non_blocking=True)
            self._pages.index_copy_(1, self._ids(blocks), self._buffer)

    def _ids(self, blocks: Ids) -> Any:
        return self.module.from_numpy(np.ascontiguousarray(blocks)).to(self._device, non_blocking=True)


class CupyGather(Gather):
    """With CuPy."""

    name = "cupy"
    library = staticmethod(foreign.cupy)
    how = "take to save and assignment to indices to load, " + _HOW

    def prepare(self, ordinal: int, pages: tuple[int, ...], buffer: tuple[int, ...]) -> Any:
        cupy = self.module
        memory = self.pages.memory
        foreign_memory = cupy.cuda.UnownedMemory(memory.address, memory.nbytes, memory, ordinal)
        self._device = cupy.cuda.Device(ordinal)
        with self._device:
            self._pages = cupy.ndarray(pages, np.int64, cupy.cuda.MemoryPointer(foreign_memory, 0))
            self._buffer = cupy.empty(buffer, np.int64)
            self._stream = cupy.cuda.Stream(non_blocking=True)
        return self._stream

    def gather(self, blocks: Ids) -> None:
        with self._device, self._stream:
            self.module.take(self._pages, self.module.asarray(blocks), axis=1, out=self._buffer)
            self._buffer.data.copy_to_host_async(self.host.address, self.nbytes, self._stream)

    def scatter(self, blocks: Ids) -> None:
        with self._device, self._stream:
            self._buffer.data.copy_from_host_async(self.host.address, self.nbytes, self._stream)
            self._pages[:, self.module.asarray(blocks)] = self._buffer
