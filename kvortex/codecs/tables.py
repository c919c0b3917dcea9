"""What codecs learn from a sample of a model's own KV, once, and keep as a small file.

A file has magic, version, length and SHA-256 (:mod:`kvortex.kernels.cache`); behind them the shape of the records, as
little-endian 32-bit numbers: layers, heads, head_dim, tokens, and places of order, parts and dtype among what these may be;
then a byte of window for each plane and channel, and a mean of each as bf16.
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
from kvortex.codecs.shape import DTYPES, ORDERS, PARTS, RecordShape
from kvortex.errors import CodecError, shown
from kvortex.kernels import cache

_MAGIC, _VERSION = b"KVXTABLE", 2
_SHAPE, _SIZES = struct.Struct("<7I"), struct.Struct("<II")
_NAMES = ORDERS, PARTS, tuple(DTYPES)
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
        return hashlib.sha256(_SIZES.pack(*self.base.shape) + self._values()).digest()

    def save(self, path: str | pathlib.Path, shape: RecordShape) -> None:
        """Writes a file, whole or not at all: the tables, and the shape of the records that they are for.

        Raises
        ------
        CodecError
            That cannot be done, or the tables are for other records.
        """
        if self.base.shape != (shape.planes, shape.channels):
            raise CodecError(f"tables of {self.base.shape} are for no records of {shape.describe().decode()}")
        named = (names.index(name) for names, name in zip(_NAMES, (shape.order, shape.parts, shape.dtype), strict=True))
        said = _SHAPE.pack(shape.layers, shape.heads, shape.head_dim, shape.tokens, *named)
        if not cache.write(pathlib.Path(path), _MAGIC, _VERSION, said + self._values()):
            raise CodecError(f"{shown(str(path))} cannot be written")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> tuple[Tables, RecordShape]:
        """Reads what :meth:`save` wrote. Raises CodecError where there is none, or it is damaged or of another version."""
        name = shown(str(path))
        try:
            body = cache.read(pathlib.Path(path), _MAGIC, _VERSION)
        except ValueError:  # a NUL in the path
            body = None
        if body is None or len(body) < _SHAPE.size:
            raise CodecError(f"{name} is no file of codec tables of this version, or damaged: see kvortex calibrate --tables")
        layers, heads, head_dim, tokens, order, parts, dtype = _SHAPE.unpack_from(body)
        try:
            shape = RecordShape(layers, heads, head_dim, tokens, ORDERS[order], PARTS[parts], tuple(DTYPES)[dtype])
        except (CodecError, IndexError) as error:
            raise CodecError(f"{name} holds tables of records that cannot be ({error}); calibrate anew") from None
        size, count = (shape.planes, shape.channels), shape.planes * shape.channels
        if len(body) != _SHAPE.size + 3 * count:
            raise CodecError(f"{name} holds no tables of {size[0]} planes and {size[1]} channels; calibrate anew")
        base = np.frombuffer(body, np.uint8, count, _SHAPE.size).reshape(size)
        mean = np.frombuffer(body, "<u2", count, _SHAPE.size + count).reshape(size)
        return cls(base.copy(), mean.astype(np.uint16)), shape

    def _values(self) -> bytes:
        return self.base.tobytes() + self.mean.astype("<u2").tobytes()


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
