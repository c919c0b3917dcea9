"""One copy a fragment, from and to page-first records: no kernel, no staging."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.devices.native import memcpy_address
from kvortex.transfer.copies import copy_paged
from kvortex.transfer.plan import Int64s
from perf import issue
from perf.baselines.base import Baseline, gpu_of
from perf.baselines.batch import batch_function
from perf.clock import CudaClock, HostClock
from perf.pages import Ids


class Fragmentwise(Baseline):
    """Lists every copy in arrays, before the clock starts."""

    def open(self) -> None:
        device = gpu_of(self.pages)
        self.functions = cu.functions()
        self.clock: CudaClock = CudaClock(device)

    def save(self, blocks: Ids) -> float:
        return self._timed(blocks, to_host=True)

    def load(self, blocks: Ids) -> float:
        return self._timed(blocks, to_host=False)

    def _timed(self, blocks: Ids, *, to_host: bool) -> float:
        cu.check((self.issue(self._table(blocks, to_host), to_host),), self.name)
        return self.clock.elapsed()

    @abstractmethod
    def issue(self, table: Int64s, to_host: bool) -> int:
        """Puts copies on the clock's stream; the driver's first error code."""

    def _table(self, blocks: Ids, to_host: bool) -> Int64s:
        """(3, 64 n) int64 of :mod:`perf.issue`, block after block."""
        layout = self.pages.layout
        base, stride, offset, nbytes = layout.fragments.T
        pages = base + blocks[:, None] * stride
        records = self.host.address + layout.record_bytes * np.arange(len(blocks))[:, None] + offset
        sizes = np.broadcast_to(nbytes, pages.shape)
        pair = (records, pages) if to_host else (pages, records)
        return np.stack([column.ravel() for column in (*pair, sizes)])


class PerFragment(Fragmentwise):
    """A call of the driver, or of ``memcpy`` on the host device, a fragment."""

    name = "per fragment"
    how = (
        "one cuMemcpyDtoHAsync or cuMemcpyHtoDAsync a fragment on one stream, called by a compiled loop that holds no GIL, "
        "from arrays that were made before the clock started; on the host device one memcpy a fragment in one thread"
    )

    def open(self) -> None:
        if isinstance(self.pages.device, CudaDevice):
            super().open()

    def issue(self, table: Int64s, to_host: bool) -> int:
        which = cu.COPY_TO_HOST if to_host else cu.COPY_TO_DEVICE
        return int(issue.copy_each(self.functions, self.clock.cells, which, table))

    def _timed(self, blocks: Ids, *, to_host: bool) -> float:
        if self.clock is not None:
            return super()._timed(blocks, to_host=to_host)
        layout, records = self.pages.layout, self.host.address + self.pages.layout.record_bytes * np.arange(len(blocks))
        return HostClock().seconds(lambda: copy_paged(memcpy_address(), layout.fragments, blocks, records, to_host))


class Batched(Fragmentwise):
    """All fragments in one call of ``cuMemcpyBatchAsync``."""

    name = "batched"
    how = (
        "all fragments in one cuMemcpyBatchAsync on one stream, with the source orders that vLLM gives (STREAM from the GPU, "
        "ANY to it), called by address from arrays that were made before the clock started"
    )

    def open(self) -> None:
        gpu_of(self.pages)
        self._address, self._with_fail_index = batch_function()
        super().open()

    def issue(self, table: Int64s, to_host: bool) -> int:
        attributes = np.zeros(3, np.int64)
        attributes.view(np.int32)[0] = _ORDER_STREAM if to_host else _ORDER_ANY
        return int(
            issue.copy_batch(self.functions, self.clock.cells, self._address, self._with_fail_index, table, attributes)
        )


_ORDER_STREAM, _ORDER_ANY = 1, 3  # CUmemcpySrcAccessOrder of cuda.h
