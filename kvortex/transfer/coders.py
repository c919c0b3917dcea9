"""Codecs as an executor of a GPU launches them: which kernels a chunk of each has, and what these read.

All are a gather that codes, or a scatter that decodes, and beside it one launch of :mod:`kvortex.kernels.coded`, which digests
what was coded, or is to be decoded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from kvortex.codecs import Codec, on_device, on_device_lossy
from kvortex.codecs.base import HEADER, HEADER_BYTES
from kvortex.codecs.lossy import LossyCodec
from kvortex.codecs.plane import PlaneCodec
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import CodecError
from kvortex.kernels.plane_form import WARPS
from kvortex.transfer.coded import DeviceCoder
from kvortex.transfer.plan import ABSOLUTE, BUFFER, IDS, STATUS, WORK, Int64s, Pool

_USED_AT = HEADER.fields["used_bytes"][1]  # type: ignore[index]
_READERS = "read_records", "seal_records"


def used_lengths(pool: Pool, slots: Int64s, most: int) -> Int64s:
    """Bytes that records in slots use, as their headers say, between a header's and ``most``: what is damaged is led nowhere.

    Parameters
    ----------
    pool
    slots : (n,) int64
        With records that nobody writes.
    most
    """
    first = np.ctypeslib.as_array((ctypes.c_uint64 * 1).from_address(pool.address + _USED_AT))
    rows = np.lib.stride_tricks.as_strided(first, (int(slots.max()) + 1,), (pool.slot_bytes,), writeable=False)
    used: Int64s = np.clip(rows[slots], HEADER_BYTES, most).astype(np.int64)
    return used


class _TileCoder(DeviceCoder):
    """A codec whose kernels take ``codec.tiles`` of each record apart, a warp some of them.

    Parameters
    ----------
    fragments : (F, 4) int64
        Of the layout.
    """

    form: ClassVar[Any]  # module that says what the codec's kernels read
    encoders: ClassVar[tuple[str, ...]]
    decoder: ClassVar[str]
    row_bytes: ClassVar[int]  # of what kernels read of a record, beside its codec

    def __init__(
        self,
        device: CudaDevice,
        codec: Any,
        fragments: Int64s,
        pool: Pool,
        kernel: Callable[[str], int],
        numbers: int,
    ) -> None:
        super().__init__(device, codec, pool, kernel, numbers)
        self._tiles = codec.tiles
        try:
            self._cells = self._hold(self.form.cells(codec, fragments, self._hold(self.form.constants(codec))))
        except BaseException:
            self.close()
            raise

    def _rows(self, save: bool, first: Int64s, count: Int64s, most: int) -> list[Int64s]:
        run, ctas = self._share(count, self._tiles, WARPS, most)
        head = (BUFFER, 0), (ABSOLUTE, self.codec.slot_bytes), (ABSOLUTE, self._cells)
        tail = (IDS, self.row_bytes * first), (ABSOLUTE, count), (ABSOLUTE, run)
        shape = ctas, 32 * WARPS
        if save:
            coding = [self._row(name, *shape, *head, (WORK, 0), *tail) for name in self.encoders]
            return [*coding, self._read("seal_records", first, count, most)]
        reading = [self._read("read_records", first, count, most)] if self._numbers else []
        return [*reading, self._row(self.decoder, *shape, *head, (STATUS, 4 * first), *tail)]


class PlaneCoder(_TileCoder):
    """:class:`kvortex.codecs.plane.PlaneCodec`: three launches to save a chunk, two to load it."""

    form: ClassVar[Any] = on_device
    encoders = ("plane_count", "plane_encode")
    decoder = "plane_decode"
    row_bytes = 4  # a page, int32
    kernels = (*encoders, decoder, *_READERS)

    def __init__(self, device: CudaDevice, codec: PlaneCodec, *others: Any) -> None:
        super().__init__(device, codec, *others)
        self.work_bytes = 4 * codec.tiles

    def _ids(self, blocks: Int64s, parts: Int64s | None) -> Int64s:
        assert parts is None, f"{self.codec.name} keeps all of a page in one slot"
        return blocks

    def _used(self, slots: Int64s, parts: Int64s | None) -> Int64s:
        return used_lengths(self._pool, slots, self.codec.slot_bytes)


class LossyCoder(_TileCoder):
    """:class:`kvortex.codecs.lossy.LossyCodec`: two launches to save a chunk, two to load it.

    A record's length follows from what it is: all that a slot holds of a coded one, and what a part keeps. So a load reads no
    header to plan by.
    """

    form: ClassVar[Any] = on_device_lossy
    encoders = ("lossy_encode",)
    decoder = "lossy_decode"
    row_bytes = 8  # a page, and which part of it the record is, int32
    kernels = (*encoders, decoder, *_READERS)
    work_bytes = 4  # a counter of who is done with the record; zeros whenever none is being coded
    codec: LossyCodec

    def _ids(self, blocks: Int64s, parts: Int64s | None) -> Int64s:
        return np.stack((blocks, np.full_like(blocks, -1) if parts is None else parts), axis=1).reshape(-1)

    def _used(self, slots: Int64s, parts: Int64s | None) -> Int64s:
        whole = np.full(len(slots), self.codec.slot_bytes)
        if parts is None:
            return whole
        kept = np.minimum(self.codec.shape.raw_bytes - parts * self.codec.part_bytes, self.codec.part_bytes)
        used: Int64s = np.where(parts < 0, whole, HEADER_BYTES + kept)
        return used


_CODERS: dict[type[Codec], type[_TileCoder]] = {PlaneCodec: PlaneCoder, LossyCodec: LossyCoder}


def coder_for(
    device: CudaDevice, codec: Codec, fragments: Int64s, pool: Pool, kernel: Callable[[str], int], numbers: int
) -> DeviceCoder:
    """What codes on a GPU. CodecError where no route launches that codec's kernels, or they cannot code such pages."""
    check_codable(codec, fragments)
    return _coder_of(codec)(device, codec, fragments, pool, kernel, numbers)


def check_codable(codec: Codec, fragments: Int64s) -> None:
    """CodecError where a GPU cannot code these pages on their way; says why."""
    _coder_of(codec).form.cells(codec, fragments, 0)


def _coder_of(codec: Codec) -> type[_TileCoder]:
    found = next((coder for kind, coder in _CODERS.items() if isinstance(codec, kind)), None)
    if found is None:
        raise CodecError(f"no transfer launches kernels of {codec.name}")
    return found
