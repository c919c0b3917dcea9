"""What codecs learn from a sample of a model's own KV, once, and keep as a small file.

A file has magic, version, length and SHA-256 (:mod:`kvortex.kernels.cache`); behind them planes and channels as
little-endian 32-bit numbers, a byte of window for each plane and channel, and a mean of each as bf16.
"""

from __future__ import annotations

import hashlib
import pathlib
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvortex.codecs.base import Bytes, as_rows
from kvortex.codecs.shape import RecordShape
from kvortex.errors import CodecError
from kvortex.kernels import cache

_MAGIC, _VERSION = b"KVXTABLE", 1
_SIZES = struct.Struct("<II")
# Bits of an exponent that lies so far below a channel's base: see kvortex.codecs.plane.
_WINDOW, _SECOND, _ESCAPE = 2, 5, 13


@dataclass(frozen=True, eq=False)
class Tables:
    """Immutable.

    Attributes
    ----------
    base : (planes, channels) uint8
        The exponent that a channel's window hangs below.
    mean : (planes, channels) uint16
        Mean of each channel, as bf16.
    """

    base: Bytes
    mean: npt.NDArray[np.uint16]

    def __post_init__(self) -> None:
        fits = self.base.ndim == 2 and self.base.dtype == np.uint8 and self.mean.dtype == np.uint16
        if not fits or self.base.shape != self.mean.shape:
            raise CodecError("tables are (planes, channels) uint8 and uint16")
        if not np.isfinite(self.means).all():
            raise CodecError("the mean of a channel is not finite")
        for array in (self.base, self.mean):
            array.setflags(write=False)

    @cached_property
    def means(self) -> npt.NDArray[np.float32]:
        """(planes, channels) float32."""
        return (np.asarray(self.mean, np.uint32) << np.uint32(16)).view(np.float32)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that name the content."""
        return hashlib.sha256(self._body()).digest()

    def save(self, path: str | pathlib.Path) -> None:
        """Writes a file, whole or not at all. Raises CodecError where that cannot be done."""
        if not cache.write(pathlib.Path(path), _MAGIC, _VERSION, self._body()):
            raise CodecError(f"{path} cannot be written")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Tables:
        """Reads what :meth:`save` wrote. Raises CodecError where there is none, or it is damaged or of another version."""
        body = cache.read(pathlib.Path(path), _MAGIC, _VERSION)
        if body is None:
            raise CodecError(f"{path} is no file of codec tables, or is damaged; calibrate anew")
        planes, channels = _SIZES.unpack_from(body)
        count = planes * channels
        if len(body) != _SIZES.size + 3 * count:
            raise CodecError(f"{path} holds no tables of {planes} planes and {channels} channels; calibrate anew")
        base = np.frombuffer(body, np.uint8, count, _SIZES.size).reshape(planes, channels)
        mean = np.frombuffer(body, "<u2", count, _SIZES.size + count).reshape(planes, channels)
        return cls(base.copy(), mean.astype(np.uint16))

    def _body(self) -> bytes:
        return _SIZES.pack(*self.base.shape) + self.base.tobytes() + self.mean.astype("<u2").tobytes()


def calibrate(records: Bytes, shape: RecordShape) -> Tables:
    """Tables from a sample of bf16 records.

    Parameters
    ----------
    records : (n, raw_bytes) uint8
        Records of the model's own KV. 150 tokens give bases that are as good as any; means want 1,500, of several texts, and
        none that begins a sequence, whose attention sinks are like no others.
    shape

    Returns
    -------
    Tables
        ``base``: of each channel the argmin over b of the sum of ``cost(b - e)`` over its exponents e. ``mean``: of its
        finite values, 0 where there are none.

    Raises
    ------
    CodecError
        There is no record, or the values are not bf16.
    """
    if shape.dtype != "bfloat16":
        raise CodecError(f"dtype = {shape.dtype}: tables are learnt from bfloat16")
    as_rows(records, shape.raw_bytes, "records")
    if not len(records):
        raise CodecError("a sample of no record teaches nothing")
    values = records.view(np.uint16).reshape(len(records), shape.planes, shape.tokens, shape.channels)
    exponents = (values >> 7).astype(np.uint8)  # the sign is shifted out
    planes, channels = shape.planes, shape.channels
    counts = np.empty((planes, channels, 256), np.float32)
    for plane in range(planes):
        cells = np.arange(channels) * 256 + exponents[:, plane].reshape(-1, channels)
        counts[plane] = np.bincount(cells.ravel(), minlength=channels * 256).reshape(channels, 256)
    base = np.argmin(counts @ _costs().T, axis=2).astype(np.uint8)
    return Tables(base, _means(values, planes, channels))


def _costs() -> npt.NDArray[np.float32]:
    """(256, 256): bits of exponent e (second axis) under base b."""
    below = np.arange(256)[:, None] - np.arange(256)
    near, second = (below >= 1) & (below <= 3), (below == 0) | ((below >= 4) & (below <= 9))
    return np.where(near, _WINDOW, np.where(second, _SECOND, _ESCAPE)).astype(np.float32)


def _means(values: npt.NDArray[np.uint16], planes: int, channels: int) -> npt.NDArray[np.uint16]:
    total, count = np.zeros((planes, channels)), np.zeros((planes, channels))
    for record in values:
        numbers = (record.astype(np.uint32) << np.uint32(16)).view(np.float32)
        finite = np.isfinite(numbers)
        total += np.where(finite, numbers, 0).sum(1, dtype=np.float64)
        count += finite.sum(1)
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0).astype(np.float32)
    bits = mean.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
