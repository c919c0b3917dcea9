"""Coded records on the host device: pages to slots and back through a codec, in compiled loops that hold no GIL.

A record is gathered from its page into memory of the thread, coded there, and copied into its slot; the other way round for a
load. The digest is of what lies in the slot: computed of a record as it was coded, and of what is decoded. Behind a record
that is shorter than a slot reserves are zeros, so that nothing of an earlier block leaves with it to a tier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.codecs import Codec
from kvortex.codecs._lossy import decode_lossy, encode_lossy
from kvortex.codecs._plane import decode_plane, encode_plane
from kvortex.codecs.base import HEADER_BYTES
from kvortex.codecs.lossy import LossyCodec
from kvortex.codecs.plane import PlaneCodec
from kvortex.devices.native import call, memcpy_address
from kvortex.digests.host import copy_part, numbers
from kvortex.errors import CodecError
from kvortex.jit import njit
from kvortex.transfer.plan import BASE, BYTES, OFFSET, STRIDE, Int64s

CODED = -1  # the part of a row that is a whole record
_HEADER_WORDS = HEADER_BYTES // 4
_PART_WORD, _USED_WORD = 3, 6  # of a header, in words of 32 bits; the latter has two


@njit(nogil=True)
def _move(memcpy, fragments, block, at, first, last, to_record):  # type: ignore[no-untyped-def]
    """Copies bytes ``first`` to ``last`` of a record from its page to ``at``, or back."""
    for f in range(len(fragments)):
        offset = fragments[f, OFFSET]
        begin, end = max(first, offset), min(last, offset + fragments[f, BYTES])
        if begin < end:
            page = fragments[f, BASE] + block * fragments[f, STRIDE] + begin - offset
            target, source = (at + begin - first, page) if to_record else (page, at + begin - first)
            call(memcpy, (target, source, end - begin))


@njit(nogil=True)
def _cross(memcpy, record, own, nbytes, sums, row, to_host, fixed):  # type: ignore[no-untyped-def]
    """Copies a coded record from this thread's memory into its slot, or back, and digests it where it is this thread's."""
    target, source = (record, own) if to_host else (own, record)
    if len(sums):
        c, lows, highs, r = fixed
        first, second = copy_part(memcpy, target, source, nbytes, to_host, 0, c, lows, highs, r)
        sums[row, 0] += first
        sums[row, 1] += second
    else:
        call(memcpy, (target, source, nbytes))


@njit(nogil=True)
def code_plane(memcpy, fragments, codec, blocks, good, records, sums, to_host, fixed):  # type: ignore[no-untyped-def]
    """Pages to slots or back by :class:`kvortex.codecs.plane.PlaneCodec`.

    Parameters
    ----------
    memcpy, fragments, blocks, records, sums, to_host, fixed
        As of :func:`kvortex.transfer.copies.copy_paged`; ``sums`` are of what lies in slots.
    codec
        Bytes of a record in pages and in a slot, then header, bases and form of
        :func:`kvortex.codecs._plane.decode_plane`.
    good : (n,) bool
        Gets whether a record fits into its slot, whose bytes mean nothing else; or of a load whether the slot has a record
        of this codec. The page stays as it is else.
    """
    raw_bytes, slot_bytes, header, base, form = codec
    values, coded = np.empty((1, raw_bytes // 2), np.uint16), np.zeros((1, slot_bytes // 4), np.uint32)
    sizes, whole = np.empty(1, np.int64), np.empty(1, np.bool_)
    for b in range(len(blocks)):
        if to_host:
            _move(memcpy, fragments, blocks[b], np.int64(values.ctypes.data), 0, raw_bytes, True)
            encode_plane(values, coded, header, base, form, sizes)
            good[b] = sizes[0] > 0
            if good[b]:
                coded[0, sizes[0] // 4 :] = np.uint32(0)
                _cross(memcpy, records[b], np.int64(coded.ctypes.data), slot_bytes, sums, b, True, fixed)
        else:
            _cross(memcpy, records[b], np.int64(coded.ctypes.data), slot_bytes, sums, b, False, fixed)
            decode_plane(coded, values, header, base, form, whole)
            good[b] = whole[0]
            if whole[0]:
                _move(memcpy, fragments, blocks[b], np.int64(values.ctypes.data), 0, raw_bytes, False)


@njit(nogil=True)
def _code_part(memcpy, fragments, codec, block, part, coded, to_host):  # type: ignore[no-untyped-def]
    """One part of a record that is kept exactly, from its page into ``coded`` or back; whether it is that part."""
    raw_bytes, part_bytes, header = codec
    begin, at = part * part_bytes, np.int64(coded.ctypes.data) + 4 * _HEADER_WORDS
    end = min(begin + part_bytes, raw_bytes)
    used = np.uint32(4 * _HEADER_WORDS + end - begin)
    if to_host:
        coded[0, :_HEADER_WORDS] = header
        coded[0, _PART_WORD], coded[0, _USED_WORD] = np.uint32(part), used
        _move(memcpy, fragments, block, at, begin, end, True)
        coded[0, _HEADER_WORDS + (end - begin) // 4 :] = np.uint32(0)
        return True
    same = coded[0, _PART_WORD] == part and coded[0, _USED_WORD] == used
    for k in range(_HEADER_WORDS):
        same = same and (k in (_PART_WORD, _USED_WORD) or coded[0, k] == header[k])
    if same:
        _move(memcpy, fragments, block, at, begin, end, False)
    return same


@njit(nogil=True)
def code_lossy(memcpy, fragments, codec, blocks, parts, good, records, sums, to_host, fixed):  # type: ignore[no-untyped-def]
    """Pages to slots or back by a :class:`kvortex.codecs.lossy.LossyCodec`.

    Parameters
    ----------
    memcpy, fragments, blocks, good, records, sums, to_host, fixed
        As of :func:`code_plane`.
    codec
        Bytes of a record in pages and in a slot, tokens of a plane, headers (2, 16) uint32, and ``LossyCodec.compiled``.
    parts : (n,) int64
        Which part of a record that is kept exactly; :data:`CODED` for a coded one.
    """
    raw_bytes, slot_bytes, tokens, headers, rest = codec
    is_key, mean, form, turn, table = rest
    values, wanted = np.empty((1, mean.shape[0], tokens, mean.shape[1]), np.uint16), np.empty(1, np.bool_)
    coded = np.zeros((1, slot_bytes // 4), np.uint32)
    body, about_parts = coded[:, _HEADER_WORDS:], (raw_bytes, slot_bytes - 4 * _HEADER_WORDS, headers[1])
    for b in range(len(blocks)):
        if not to_host:
            _cross(memcpy, records[b], np.int64(coded.ctypes.data), slot_bytes, sums, b, False, fixed)
        if parts[b] >= 0:
            good[b] = _code_part(memcpy, fragments, about_parts, blocks[b], parts[b], coded, to_host)
        elif to_host:
            _move(memcpy, fragments, blocks[b], np.int64(values.ctypes.data), 0, raw_bytes, True)
            wanted[0] = True
            encode_lossy(values, body, is_key, mean, form, turn, table, wanted)
            coded[0, :_HEADER_WORDS] = headers[0]
            good[b] = wanted[0]
        else:
            good[b] = (coded[0, :_HEADER_WORDS] == headers[0]).all()
            wanted[0] = good[b]
            decode_lossy(body, values, is_key, mean, form, turn, table, wanted)
            if good[b]:
                _move(memcpy, fragments, blocks[b], np.int64(values.ctypes.data), 0, raw_bytes, False)
        if to_host and good[b]:
            _cross(memcpy, records[b], np.int64(coded.ctypes.data), slot_bytes, sums, b, True, fixed)


class Coder:
    """What an executor of the host device needs of a codec.

    Parameters
    ----------
    codec
        Of whose records slots hold ``codec.slot_bytes`` each.

    Raises
    ------
    CodecError
        It has no compiled loop.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._fixed: tuple[Any, ...]
        if isinstance(codec, PlaneCodec):
            header = codec.header.view(np.uint32)
            self._fixed = codec.shape.raw_bytes, codec.slot_bytes, header, codec.tables.base, codec.form
        elif isinstance(codec, LossyCodec):
            self._fixed = codec.shape.raw_bytes, codec.slot_bytes, codec.shape.tokens, codec.headers, codec.compiled
        else:
            raise CodecError(f"codec {codec.name} has no loop on the host device")

    def call(self, fragments: Int64s, blocks: Int64s, parts: Int64s | None, good: npt.NDArray[np.bool_]) -> Any:
        """A compiled function, what all its calls get behind ``memcpy``, and what each gets some rows of."""
        if isinstance(self.codec, PlaneCodec):
            return code_plane, (fragments, self._fixed), (blocks, good)
        rows = np.full(len(blocks), CODED, np.int64) if parts is None else parts
        return code_lossy, (fragments, self._fixed), (blocks, rows, good)

    def load_compiled(self, fragments: Int64s) -> None:
        """Loads the function, or compiles it: not in the middle of the first transfer."""
        none = np.empty(0, np.int64)
        function, fixed, rows = self.call(fragments, none, None, np.empty(0, np.bool_))
        function(memcpy_address(), *fixed, *rows, none, np.empty((0, 2), np.uint64), True, numbers(0))
