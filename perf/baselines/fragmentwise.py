"""One copy a fragment, from and to page-first records: no kernel, no staging."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from kvortex.devices import driver as cu
from kvortex.devices.native import memcpy_address
from kvortex.digests.host import numbers
from kvortex.errors import DeviceUnavailableError
from kvortex.transfer.copies import copy_paged
from kvortex.transfer.plan import Int64s
from perf import issue
from perf.baselines.base import Baseline
from perf.clock import CudaClock, clock_of
from perf.pages import Ids

_NO_SUMS = np.empty((0, 2), np.uint64)  # of digests
_ORDER_STREAM, _ORDER_ANY = 1, 3  # CUmemcpySrcAccessOrder of cuda.h


class Fragmentwise(Baseline):
    """Knows every copy before the clock starts."""

    def open(self) -> None:
        self.clock = clock_of(self.pages.device)

    def save(self, blocks: Ids) -> float:
        return self._timed(blocks, to_host=True)

    def load(self, blocks: Ids) -> float:
        return self._timed(blocks, to_host=False)

    def _timed(self, blocks: Ids, *, to_host: bool) -> float:
        layout = self.pages.layout
        records = self.host.address + layout.record_bytes * np.arange(len(blocks))
        if not isinstance(self.clock, CudaClock):
            arguments = (memcpy_address(), layout.fragments, blocks, records, _NO_SUMS, to_host, numbers(0))
            return self.clock.seconds(lambda: copy_paged(*arguments))
        base, stride, offset, nbytes = layout.fragments.T
        here, there = base + blocks[:, None] * stride, records[:, None] + offset
        columns = (*((there, here) if to_host else (here, there)), np.broadcast_to(nbytes, here.shape))
        table = np.stack([column.ravel() for column in columns])
        cu.check((self.issue(self.clock, table, to_host),), self.name)
        return self.clock.elapsed()

    @abstractmethod
    def issue(self, clock: CudaClock, table: Int64s, to_host: bool) -> int:
        """Puts copies, the columns of a (3, 64 n) table of :mod:`perf.issue`, on a clock's stream; the first error code."""


class PerFragment(Fragmentwise):
    """A call of the driver, or of ``memcpy`` on the host device, a fragment."""

    name = "per fragment"
    how = (
        "one cuMemcpyDtoHAsync or cuMemcpyHtoDAsync a fragment on one stream, called by a compiled loop that holds no GIL, "
        "from arrays that were made before the clock started; on the host device one memcpy a fragment in one thread"
    )

    def require(self) -> None:
        """Nothing is missing anywhere."""

    def issue(self, clock: CudaClock, table: Int64s, to_host: bool) -> int:
        which = cu.COPY_TO_HOST if to_host else cu.COPY_TO_DEVICE
        return int(issue.copy_each(cu.functions(), clock.cells, which, table))


class Batched(Fragmentwise):
    """All fragments in one call of ``cuMemcpyBatchAsync``."""

    name = "one batch"  # not "batched": so is called a route of kvortex, over several streams
    how = (
        "all fragments in one cuMemcpyBatchAsync on one stream, with the source orders that vLLM gives (STREAM from the GPU, "
        "ANY to it), called by address from arrays that were made before the clock started"
    )

    def require(self) -> None:
        self.gpu()
        functions = cu.functions()
        self._address, self._with_fail_index = int(functions[cu.COPY_BATCH]), False
        if not self._address:
            self._address, self._with_fail_index = int(functions[cu.COPY_BATCH_12]), True
        if not self._address:
            version = cu.driver_version()
            seen = f"{version // 1000}.{version % 1000 // 10}"
            raise DeviceUnavailableError(f"cuMemcpyBatchAsync came with CUDA 12.8, and this driver of CUDA {seen} has none")

    def issue(self, clock: CudaClock, table: Int64s, to_host: bool) -> int:
        attributes = np.zeros(3, np.int64)
        attributes.view(np.int32)[0] = _ORDER_STREAM if to_host else _ORDER_ANY
        return int(issue.copy_batch(cu.functions(), clock.cells, self._address, self._with_fail_index, table, attributes))
