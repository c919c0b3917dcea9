"""Codecs as an executor of a GPU launches them: which kernels a chunk of each has, and what these read.

All are a gather that codes, and a launch of :mod:`kvortex.kernels.coded` which digests what was coded; or launches of
:mod:`kvortex.kernels.coded_read`, which digest what is to be decoded, and a scatter that decodes.
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
from kvortex.kernels.plane_form import FIXED_BYTES, WARPS
from kvortex.transfer import _coded
from kvortex.transfer.coded import Parameter
from kvortex.transfer.coded_layers import LayeredCoder, Span, Strip
from kvortex.transfer.plan import ABSOLUTE, BUFFER, IDS, STATUS, WORK, Int64s, Pool

_USED_AT = HEADER.fields["used_bytes"][1]  # type: ignore[index]
_READERS = "read_records", "seal_records"
_ALIGNED = 64  # bytes; strips begin and end at multiples of that, as the parts of a record's front do


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
        self.tiles = codec.tiles
        try:
            self._cells = self._hold(self.form.cells(codec, fragments, self._hold(self.form.constants(codec))))
        except BaseException:
            self.close()
            raise

    def _rows(self, save: bool, first: Int64s, count: Int64s, most: int) -> list[Int64s]:
        if not save:
            return self._span_rows(self._whole(len(first)), first, count, most)
        head, tail, shape = self._launch(self.codec.slot_bytes, self.tiles, first, count, most)
        coding = [self._row(name, *shape, *head, (WORK, 0), *tail) for name in self.encoders]
        return [*coding, self._seal(first, count, most)]

    def _decode(self, span: Span, first: Int64s, count: Int64s, most: int) -> Int64s:
        head, tail, shape = self._launch(span.pitch, span.end - span.first, first, count, most)
        span_of = (ABSOLUTE, span.first), (ABSOLUTE, span.end), *self._where(span)
        return self._row(self.decoder, *shape, *head, (STATUS, 4 * first), *tail, *span_of)

    def _where(self, span: Span) -> tuple[Parameter, ...]:
        """What a decoder is told of strips, behind the group's tiles."""
        return ()

    def _launch(
        self, pitch: Any, tiles: int, first: Int64s, count: Int64s, most: int
    ) -> tuple[tuple[Parameter, ...], tuple[Parameter, ...], tuple[Int64s, int]]:
        """The first and the last parameters of a kernel over so many tiles of each record, and its shape."""
        run, ctas = self._share(count, tiles, WARPS, most)
        head = (BUFFER, 0), (ABSOLUTE, pitch), (ABSOLUTE, self._cells)
        return head, ((IDS, self.row_bytes * first), (ABSOLUTE, count), (ABSOLUTE, run)), (ctas, 32 * WARPS)


class PlaneCoder(_TileCoder):
    """:class:`kvortex.codecs.plane.PlaneCodec`: three launches to save a chunk, two to load it."""

    form: ClassVar[Any] = on_device
    encoders = ("plane_count", "plane_encode")
    decoder = "plane_decode"
    row_bytes = 4  # a page, int32
    kernels = (*encoders, decoder, *_READERS)
    strips = 3  # header and table, fixed parts, tails
    codec: PlaneCodec

    def __init__(self, device: CudaDevice, codec: PlaneCodec, *others: Any) -> None:
        _coded.load_compiled()
        super().__init__(device, codec, *others)
        self.work_bytes = 4 * codec.tiles
        self.again = codec.fixed_bytes - FIXED_BYTES * codec.tiles

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
        words = slots_as_words(self._pool, int(slots.max()) + 1)
        step, table = self._pool.slot_bytes // 4, HEADER_BYTES // 4
        _coded.tail_offsets(words, step, slots, table, edges, self.codec.slot_bytes, made)
        return made

    def _spans(self, offsets: Int64s, edges: Int64s, starts: Int64s, done: Int64s | None) -> list[Span]:
        begin, most, head = self.codec.fixed_bytes, self.codec.slot_bytes, np.zeros(len(starts), np.int64)
        least = np.maximum(np.minimum.reduceat(offsets, starts) // _ALIGNED * _ALIGNED, begin)
        longest = np.minimum(-(-np.maximum.reduceat(offsets, starts) // _ALIGNED) * _ALIGNED, most)
        made, done = [], head + begin if done is None else done
        for g, (first, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            fixed, stop = (head + self.again + FIXED_BYTES * tile for tile in (first, end))
            front = [Strip(head, stop, head)]  # header and table lie before the first tile
            if first:
                front = [Strip(head, head + self.again, None), Strip(fixed, stop, fixed)]
            behind = np.maximum(longest[:, g + 1], done)  # an earlier chunk of more records may have got further
            made.append(Span(first, end, (*front, Strip(least[:, g], behind, done, headed=True))))
            done = behind
        return made

    def _where(self, span: Span) -> tuple[Parameter, ...]:
        tails_from = span.strips[-1].begin if len(span.strips) > 1 else self.codec.fixed_bytes
        return ((ABSOLUTE, tails_from),)


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
    strips = 1
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

    def _spans(self, offsets: Int64s, edges: Int64s, starts: Int64s, done: Int64s | None) -> list[Span]:
        of_plane = np.where(self.codec.compiled[0], self.codec.key_bytes, self.codec.value_bytes)
        before = HEADER_BYTES + np.append(0, np.cumsum(of_plane))
        ends = before[edges // (self.tiles // self.codec.shape.planes)]
        ends[edges == 0] = 0  # the header lies before the first tile
        none, rows = np.zeros(len(starts), np.int64), np.stack((edges[:-1], edges[1:], ends[:-1], ends[1:]), axis=1)
        return [
            Span(first, end, (Strip(none + begin, none + stop, none + begin),)) for first, end, begin, stop in rows.tolist()
        ]


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
