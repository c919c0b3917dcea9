"""Routes: how the bytes of scattered blocks cross the link, and which one serves a transfer best."""

from __future__ import annotations

import enum

from kvortex.transfer.plan import BYTES, Int64s

# On an H100, PCIe 5 x16 (perf/results): a strided DMA loses about 40 ns a line, so lines of 16 KiB reach 0.89 of a
# contiguous DMA and shorter ones much less; up to a few MiB a kernel that writes over the link is done before a gather, a
# DMA and the gap between them are.
STRIDED_LINE_BYTES = 16 << 10
STRIDED_LEAST_LINES = 8
MAPPED_BYTES = 4 << 20
# With four staging buffers this long, each launch beside a model brings 256 MiB to the link: as much as it takes in 5 ms.
DEEP_BYTES = 64 << 20
DEEP_LINE_BYTES = 32 << 10  # and shorter lines then leave faster that way than by strided DMA
# Batched copies need long fragments: over 8 streams 49 / 49 GB/s at 32 KiB and 54 / 52 at 128 KiB, but 40 / 5 at 18 KiB.
BATCHED_BYTES = 64 << 10
_LINES = 4  # column of kvortex.transfer.plan.strides


class Route(enum.Enum):
    """What a transfer goes by.

    ``DIRECT``
        One contiguous DMA a record, for records that are one long fragment.
    ``STAGED``
        A gather kernel fills staging buffers in VRAM, and each leaves in one DMA. A launch for each buffer: while a model
        computes it waits for the end of the model's kernel, and takes nothing from the next one.
    ``RESIDENT``
        The same with one launch for all buffers: it waits once, and then keeps few multiprocessors busy. The fastest.
    ``STRIDED``
        One DMA for all fragments of a block that lie equally far apart. Needs no multiprocessor and starts at once.
    ``BATCHED``
        One DMA a fragment, wherever it lies, in one call of the driver for each stream. Needs no multiprocessor and starts at
        once. A call for each DMA where the driver has no such function.
    ``MAPPED``
        A kernel reads or writes the pinned pool over the link. The least latency for little.
    """

    DIRECT = "direct"
    STAGED = "staged"
    RESIDENT = "resident"
    STRIDED = "strided"
    BATCHED = "batched"
    MAPPED = "mapped"


def choose(
    runs: Int64s,
    nbytes: int,
    *,
    beside_compute: bool,
    resident: bool = True,
    buffer_bytes: int = 0,
    layerwise: bool = False,
    batches: bool = False,
) -> Route:
    """The route of one transfer.

    Parameters
    ----------
    runs : (R, 6) int64
        Of :func:`kvortex.transfer.plan.strides`.
    nbytes
        Payload of the transfer.
    beside_compute
        Whether the GPU is busy with something else.
    resident
        Whether resident kernels can run here.
    buffer_bytes
        Of a staging buffer.
    layerwise
        Whether the first layers are wanted before the last ones; a strided DMA takes all layers of a block at once.
    batches
        Whether the driver takes many copies in one call.
    """
    deep = beside_compute and buffer_bytes >= DEEP_BYTES
    least = DEEP_LINE_BYTES if deep else STRIDED_LINE_BYTES
    long_lines = runs[:, BYTES].min() >= least and runs[:, _LINES].sum() >= STRIDED_LEAST_LINES * len(runs)
    if beside_compute and long_lines and not layerwise:
        return Route.STRIDED
    if beside_compute and batches and not layerwise and runs[:, BYTES].min() >= BATCHED_BYTES:
        return Route.BATCHED
    if nbytes <= MAPPED_BYTES:
        return Route.MAPPED
    return Route.RESIDENT if resident and not deep else Route.STAGED


def resident_ctas(*, beside_compute: bool) -> int:
    """CTAs of a resident kernel, each of which keeps a multiprocessor. Two feed the link; four fill it sooner."""
    return 2 if beside_compute else 4
