"""Codecs as an executor of a GPU launches them: which kernels a chunk of each has, and what these read.

All are a gather that codes and digests what it has coded, or a scatter that digests and decodes. Groups of layers have launches
of :mod:`kvortex.kernels.coded_read` for their digests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvortex.codecs import Codec, on_device, on_device_lossy
from kvortex.codecs.base import HEADER, HEADER_BYTES
from kvortex.codecs.lossy import LossyCodec
from kvortex.codecs.plane import PlaneCodec
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import CodecError
from kvortex.kernels.plane_form import ENCODE_WARPS, FIXED_BYTES, WARPS
from kvortex.transfer.coded import _lookups, _strips
from kvortex.transfer.coded.layers import LayeredCoder
from kvortex.transfer.coded.plans import Parameter
from kvortex.transfer.plan import ABSOLUTE, BUFFER, IDS, STATUS, WORK, Int64s, Pool

# Tiles that a warp takes at a time, to save and to load: of 57 to 256 blocks loads by 7 or 8 took 3 to 11 percent longer,
# those of plane by 11 to 14 from 2 to 6 (an H200).
_MOST_RUN, _MOST_LOAD = 16, 4
_USED_AT = HEADER.fields["used_bytes"][1]  # type: ignore[index]


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


def slots_as_words(pool: Pool, count: int) -> npt.NDArray[np.uint32]:
    """The first ``count`` slots, to be read alone."""
    first = np.ctypeslib.as_array((ctypes.c_uint32 * 1).from_address(pool.address))
    return np.lib.stride_tricks.as_strided(first, (count * pool.slot_bytes // 4,), (4,), writeable=False)


class _TileCoder(LayeredCoder):
    """A codec whose kernels take ``codec.tiles`` of each record apart, a warp some of them.

    Parameters
    ----------
    fragments : (F, 4) int64
        Of the layout.
    """

    form: ClassVar[Any]  # module that says what the codec's kernels read
    encoder: ClassVar[str]
    decoder: ClassVar[str]
    save_warps: ClassVar[int] = WARPS  # of a CTA
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
        _lookups.load_compiled()
        _strips.load_compiled()
        super().__init__(device, codec, pool, kernel, numbers)
        self.tiles = codec.tiles
        try:
            self._cells = self._hold(self.form.cells(codec, fragments, self._hold(self.form.constants(codec))))
        except BaseException:
            self.close()
            raise

    def _rows(self, save: bool, first: Int64s, count: Int64s, most: int) -> list[Int64s]:
        if not save:
            room = self.codec.slot_bytes
            if self._numbers:
                return [self._decode_digest(room, first, count, most)]
            return [self._decode(0, self.tiles, room, first, count, most)]
        head, tail, shape = self._launch(self.codec.slot_bytes, self.tiles, first, count, most, save=True)
        where = (ABSOLUTE, self._numbers), self._sums(first), (STATUS, 4 * first)
        return [self._row(self.encoder, *shape, *head, (WORK, 0), *tail, *where)]

    def _launches_of_one(self, first: int, end: int, headed: tuple[bool, ...]) -> Int64s:
        one = np.ones(1, np.int64)
        reads = [self._read(one, one, 1, 0, 0, 0, 0, headed=strip) for strip in headed if self._numbers]
        return np.concatenate([*reads, self._decode(first, end, 0, one, one, 1)])

    def _decode(self, tile: int, end: int, pitch: int, first: Int64s, count: Int64s, most: int) -> Int64s:
        """A launch over tiles ``tile`` to ``end`` of records that lie ``pitch`` bytes apart."""
        head, tail, shape = self._launch(pitch, end - tile, first, count, most)
        span = (ABSOLUTE, tile), (ABSOLUTE, end), *self._where()
        return self._row(self.decoder, *shape, *head, (STATUS, 4 * first), *tail, *span)

    def _decode_digest(self, pitch: int, first: Int64s, count: Int64s, most: int) -> Int64s:
        """A launch over all of records as they are, which also digests them."""
        head, tail, shape = self._launch(pitch, self.tiles, first, count, most)
        sums = (ABSOLUTE, self._numbers), self._sums(first)
        return self._row(self.decoder + "_digest", *shape, *head, (STATUS, 4 * first), *tail, *sums)

    def _where(self) -> tuple[Parameter, ...]:
        """What a decoder is told besides of whole records, behind its tiles."""
        return ()

    def _launch(
        self, pitch: Any, tiles: int, first: Int64s, count: Int64s, most: int, *, save: bool = False
    ) -> tuple[tuple[Parameter, ...], tuple[Parameter, ...], tuple[Int64s, int]]:
        """The first and the last parameters of a kernel over so many tiles of each record, and its shape."""
        warps = self.save_warps if save else WARPS
        run = self._run(count * tiles, warps * most, save)
        ctas = np.minimum(most, -(-count * -(-tiles // run) // warps))
        head = (BUFFER, 0), (ABSOLUTE, pitch), (ABSOLUTE, self._cells)
        return head, ((IDS, self.row_bytes * first), (ABSOLUTE, count), (ABSOLUTE, run)), (ctas, 32 * warps)

    def _run(self, tiles: Int64s, warps: int, save: bool) -> Int64s:
        """Tiles that a warp takes at a time, (c,), where so many warps share so many."""
        run: Int64s = _strips.even_run(-(-tiles // warps), *self.runs[not save])
        return run


class PlaneCoder(_TileCoder):
    """:class:`kvortex.codecs.plane.PlaneCodec`: a launch to save a chunk, and one to load it."""

    form: ClassVar[Any] = on_device
    encoder, save_warps = "plane_encode", ENCODE_WARPS
    decoder = "plane_decode"
    ctas_each: ClassVar = {(0, 0): (4, 2), (9, 0): (8, 4), (10, 0): (6, 3), (12, 0): (4, 2)}
    # Of a save no fewer, since a warp looks at the cells of all shares before its own: 3 blocks took 48, 35 and 37 us by 1, 2
    # and 4 tiles, 7 took 53, 50 and 41 by 2, 3 and 4 (an H200, version 1).
    runs = (4, _MOST_RUN), (1, _MOST_LOAD)
    row_bytes = 4  # a page, int32
    kernels = (encoder, decoder, decoder + "_digest", "read_records")
    strips = 3  # header and table, which are digested with the first tiles; fixed parts; tails
    headed = False, True
    codec: PlaneCodec

    def __init__(self, device: CudaDevice, codec: PlaneCodec, *others: Any) -> None:
        super().__init__(device, codec, *others)
        self.work_bytes, self.least = 4 + 4 * codec.tiles, codec.fixed_bytes  # zeros whenever nothing is being coded
        self.again = codec.fixed_bytes - FIXED_BYTES * codec.tiles
        self._words = np.empty(0, np.uint32)  # slots up to the last one that was looked at

    def _ids(self, blocks: Int64s, parts: Int64s | None) -> Int64s:
        assert parts is None, f"{self.codec.name} keeps all of a page in one slot"
        return blocks

    def _used(self, slots: Int64s, parts: Int64s | None) -> Int64s:
        return used_lengths(self._pool, slots, self.codec.slot_bytes)

    def _can_cut(self) -> bool:
        return bool(self.codec.slot_bytes >= self.codec.fixed_bytes)

    def _look(self, slots: Int64s, edges: Int64s, begin: Int64s | None) -> Int64s:
        made = np.empty((len(slots), len(edges)), np.int64)
        made[:, 0] = self.codec.fixed_bytes if begin is None else begin
        words, count = self._words, int(slots[-1]) + 1
        if 4 * len(words) < count * self._pool.slot_bytes:  # it takes tens of microseconds; two threads may both do it
            words = self._words = slots_as_words(self._pool, count)
        where = self._pool.slot_bytes // 4, slots, HEADER_BYTES // 4, _USED_AT // 4
        _lookups.tail_offsets(words, *where, self.tiles, edges, self.codec.slot_bytes, made)
        return made

    def _fixed(self, edges: Int64s) -> Int64s:
        made = np.zeros((len(edges) - 1, self.strips, _strips.STRIP_COLUMNS), np.int64)
        parts = self.again + FIXED_BYTES * edges
        made[1:, 0, _strips.END] = self.again
        made[:, 1, _strips.BEGIN], made[:, 1, _strips.END] = parts[:-1], parts[1:]
        made[0, 1, _strips.BEGIN] = 0  # header and table lie before the first tile
        made[..., _strips.DIGESTED] = made[..., _strips.BEGIN]
        return made

    def _where(self) -> tuple[Parameter, ...]:
        return ((ABSOLUTE, self.codec.fixed_bytes),)


class LossyCoder(_TileCoder):
    """:class:`kvortex.codecs.lossy.LossyCodec`: a launch to save a chunk, and one to load it.

    A record's length follows from what it is: all that a slot holds of a coded one, and what a part keeps. So a load reads no
    header to plan by.
    """

    form: ClassVar[Any] = on_device_lossy
    encoder = "lossy_encode"
    decoder = "lossy_decode"
    runs = (1, _MOST_RUN), (1, _MOST_LOAD)
    row_bytes = 8  # a page, and which part of it the record is, int32
    kernels = (encoder, decoder, decoder + "_digest", "read_records")
    ctas_each: ClassVar = {(0, 0): (2, 2), (9, 0): (2, 3), (12, 0): (2, 2)}
    work_bytes = 4  # a counter of who is done with the record; zeros whenever none is being coded
    strips, headed = 1, (False,)
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

    def _fixed(self, edges: Int64s) -> Int64s:
        of_plane = np.where(self.codec.compiled[0], self.codec.key_bytes, self.codec.value_bytes)
        before = HEADER_BYTES + np.append(0, np.cumsum(of_plane))
        ends = before[edges // (self.tiles // self.codec.shape.planes)]
        ends[edges == 0] = 0  # the header lies before the first tile
        return np.stack((ends[:-1], ends[1:], ends[:-1]), axis=1)[:, None]

    def _run(self, tiles: Int64s, warps: int, save: bool) -> Int64s:
        if not save:
            return super()._run(tiles, warps, save)
        run, plane = np.clip(tiles // warps, *self.runs[0]), self.tiles // self.codec.shape.planes
        return run - np.where(run > plane, run % plane, 0)  # whole planes lie in one range, parts of them in up to 17


_CODERS: dict[type[Codec], type[_TileCoder]] = {PlaneCodec: PlaneCoder, LossyCodec: LossyCoder}


def coder_for(
    device: CudaDevice, codec: Codec, fragments: Int64s, pool: Pool, kernel: Callable[[str], int], numbers: int
) -> LayeredCoder:
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
