"""A paged KV cache of the command's own, whose every byte follows from the keys of its blocks."""

from __future__ import annotations

from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvortex.devices import Device, DeviceBuffer
from kvortex.devices.host import HostBuffer
from kvortex.jit import njit
from kvortex.keys import KeyArray
from kvortex.layout import KVLayout, TensorSpec

Words = npt.NDArray[np.uint64]
BlockIds = npt.NDArray[np.int64]

_ITEM_BYTES = 2  # bf16
_POISON = np.uint64(0xDEADDEADDEADDEAD)
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: its multiples are spread evenly over 64 bits
_MIX = np.uint64(0xBF58476D1CE4E5B9)


@njit(nogil=True)
def _mixed(word):  # type: ignore[no-untyped-def]
    """The first half of SplitMix64's finalizer: bits that lie together go apart."""
    word = (word ^ (word >> np.uint64(30))) * _MIX
    return word ^ (word >> np.uint64(27))


@njit(nogil=True)
def _seed(key, layer, side):  # type: ignore[no-untyped-def]
    """What one fragment's words start from: all 32 bytes of the key, the layer, and K or V."""
    seed = _mixed(np.uint64(2 * layer + side + 1) * _ODD)
    for i in range(key.size):
        seed = _mixed(seed ^ key[i]) + _ODD
    return seed


@njit(nogil=True)
def _fill(image, block_ids, keys, layer):  # type: ignore[no-untyped-def]
    """Writes the pages of one layer: ``image`` (2, blocks, words) uint64, ``keys`` (n, 4) uint64."""
    for i in range(block_ids.size):
        for side in range(2):
            page, seed = image[side, block_ids[i]], _seed(keys[i], layer, side)
            for at in range(page.size):
                page[at] = _mixed(seed + np.uint64(at) * _ODD)


@njit(nogil=True)
def _count(page, seed):  # type: ignore[no-untyped-def]
    """Bytes of one fragment that are wrong."""
    wrong = 0
    for at in range(page.size):
        difference = page[at] ^ _mixed(seed + np.uint64(at) * _ODD)
        while difference != np.uint64(0):
            wrong += int(difference & np.uint64(255) != np.uint64(0))
            difference >>= np.uint64(8)
    return wrong


@njit(nogil=True)
def _wrong(image, block_ids, keys, layer):  # type: ignore[no-untyped-def]
    """Bytes of one layer's pages that are not what :func:`_fill` writes."""
    wrong = 0
    for i in range(block_ids.size):
        for side in range(2):
            page, seed = image[side, block_ids[i]], _seed(keys[i], layer, side)
            seen = np.uint64(0)
            for at in range(page.size):  # without a branch, for the pages that are right
                seen |= page[at] ^ _mixed(seed + np.uint64(at) * _ODD)
            if seen != np.uint64(0):
                wrong += _count(page, seed)
    return wrong


class Pages:
    """Pages of a model on a device: for each layer a tensor ``[2, blocks, tokens, heads, dim]`` of 2-byte elements.

    Parameters
    ----------
    device
    num_blocks, layers, tokens, heads, dim
        ``tokens * heads * dim`` is a multiple of 4, so that a fragment is whole words.

    Attributes
    ----------
    layout : KVLayout
    num_blocks : int

    The contents are made and checked on the host. On a GPU the ids of one call are best a few runs of neighbours,
    since each run is one copy a layer and side.
    """

    def __init__(self, device: Device, num_blocks: int, layers: int, tokens: int, heads: int, dim: int) -> None:
        shape = (2, num_blocks, tokens, heads, dim)
        self.device, self.num_blocks = device, num_blocks
        self._fragment = tokens * heads * dim * _ITEM_BYTES
        self._buffers: list[DeviceBuffer] = []
        self._images: list[Words] = []
        try:
            for _ in range(layers):
                self._buffers.append(device.allocate(2 * num_blocks * self._fragment))
                self._images.append(self._image(self._buffers[-1]))
        except BaseException:
            self.close()
            raise
        self.clear(np.arange(num_blocks))
        strides = tuple(np.cumprod((_ITEM_BYTES, *shape[:0:-1]))[::-1].tolist())
        specs = [TensorSpec(buffer.address, shape, strides, _ITEM_BYTES, device.name, buffer) for buffer in self._buffers]
        self.layout = KVLayout.from_pointers(specs, block_axis=1, order="NHD")

    def _image(self, buffer: DeviceBuffer) -> Words:
        """The layer's words on the host: the memory itself, or of a GPU's a copy that calls bring up to date."""
        words = buffer.array.view(np.uint64) if isinstance(buffer, HostBuffer) else np.empty(buffer.nbytes // 8, np.uint64)
        return words.reshape(2, self.num_blocks, -1)

    def fill(self, block_ids: BlockIds, keys: KeyArray) -> None:
        """Writes what belongs to ``keys``, (n, 32) uint8, into different pages; done when it returns."""
        words = np.ascontiguousarray(keys).view(np.uint64)
        for layer, image in enumerate(self._images):
            _fill(image, np.asarray(block_ids, np.int64), words, layer)
            self._upload(layer, block_ids)

    def clear(self, block_ids: BlockIds) -> None:
        """Writes poison, so that bytes which nobody brought are no right bytes left over."""
        for layer, image in enumerate(self._images):
            image[:, block_ids] = _POISON
            self._upload(layer, block_ids)

    def wrong_bytes(self, block_ids: BlockIds, keys: KeyArray) -> int:
        """Bytes in pages that are not what :meth:`fill` writes for ``keys``; 0 where all is well."""
        words, wrong = np.ascontiguousarray(keys).view(np.uint64), 0
        for layer, image in enumerate(self._images):
            self._download(layer, block_ids)
            wrong += _wrong(image, np.asarray(block_ids, np.int64), words, layer)
        return wrong

    def _upload(self, layer: int, block_ids: BlockIds) -> None:
        if not isinstance(self._buffers[layer], HostBuffer):
            for side, first, count in _runs(block_ids):
                words = self._images[layer][side, first : first + count]
                self._buffers[layer].write(words, (side * self.num_blocks + first) * self._fragment)

    def _download(self, layer: int, block_ids: BlockIds) -> None:
        if not isinstance(self._buffers[layer], HostBuffer):
            for side, first, count in _runs(block_ids):
                offset = (side * self.num_blocks + first) * self._fragment
                read = self._buffers[layer].read(offset, count * self._fragment)
                self._images[layer][side, first : first + count] = read.view(np.uint64).reshape(count, -1)

    def close(self) -> None:
        """Gives the memory back; nothing may be in flight."""
        self._images.clear()
        for buffer in self._buffers:
            buffer.free()

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _runs(block_ids: BlockIds) -> list[tuple[int, int, int]]:
    """(side, first, count) of the runs of neighbours, for both sides."""
    ids = np.sort(block_ids)
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1) if len(ids) else []
    return [(side, int(run[0]), len(run)) for side in range(2) for run in runs]
