"""What codecs learn from a sample of a model's own KV, once, and keep as a small file.

A file has magic, version, length and SHA-256 (:mod:`kvortex.kernels.cache`); behind them the shape of the records, as
little-endian 32-bit numbers: layers, heads, head_dim, tokens, and places of order, parts and dtype among what these may be;
then of each plane and channel a byte of window, a mean as bf16, and a byte of spread; the counts, 32 bits each; and the
longest record, 64 bits, which files of version 2 do not have.
"""

from __future__ import annotations

import hashlib
import pathlib
import struct
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvortex.codecs._plane import encode_plane
from kvortex.codecs.base import HEADER_BYTES, Bytes, as_rows
from kvortex.codecs.shape import DTYPES, ORDERS, PARTS, RecordShape
from kvortex.errors import CodecError, shown
from kvortex.kernels import cache
from kvortex.kernels.plane_form import CHANNELS, ROWS

_MAGIC, _VERSION, _WITHOUT_LONGEST = b"KVXTABLE", 3, 2
_SHAPE, _SIZES, _LONGEST = struct.Struct("<7I"), struct.Struct("<II"), struct.Struct("<Q")
_NAMES = ORDERS, PARTS, tuple(DTYPES)
# Bits of an exponent that lies so far below a channel's base: see kvortex.codecs.plane.
_WINDOW, _SECOND, _ESCAPE = 2, 5, 13
SCALE_ZERO = 128  # the spread that is 1
FINE, FAR = 64, 32  # bins of a spread, and spreads that they reach to each side
BINS = 2 * FINE * FAR + 1


@dataclass(frozen=True, eq=False)
class Tables:
    """Immutable.

    Attributes
    ----------
    base : (planes, channels) uint8
        The exponent that a channel's window hangs below.
    mean : (planes, channels) uint16
        Mean of each channel, as bf16.
    spread : (planes, channels) uint8
        The standard deviation of each channel, as the code of the nearest quarter power of two: 128 is 1.
    counts : (2, BINS) uint32
        Of K and of V, how often a value lies so many 64ths of its channel's spread from the mean: what a distribution looks
        like, whatever its channel. The first and the last bin have all beyond. Of a latent the first row.
    longest : int
        Bytes of the longest record that codec ``plane`` makes of the sample, which its slots are measured by; 0 for unknown.
    """

    base: Bytes
    mean: npt.NDArray[np.uint16]
    spread: Bytes = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    counts: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros((2, BINS), np.uint32))
    longest: int = 0

    def __post_init__(self) -> None:
        if not self.spread.size:
            object.__setattr__(self, "spread", np.full(self.base.shape, SCALE_ZERO, np.uint8))
        fits = self.base.ndim == 2 and self.base.dtype == np.uint8 and self.mean.dtype == np.uint16
        fits &= self.spread.dtype == np.uint8 and self.counts.dtype == np.uint32 and self.counts.shape == (2, BINS)
        if not fits or not self.base.shape == self.mean.shape == self.spread.shape:
            raise CodecError("tables are (planes, channels) uint8, uint16 and uint8, and (2, bins) uint32")
        if not np.isfinite(self.means).all():
            raise CodecError("the mean of a channel is not finite")
        for array in (self.base, self.mean, self.spread, self.counts):
            array.setflags(write=False)

    @cached_property
    def means(self) -> npt.NDArray[np.float32]:
        """(planes, channels) float32."""
        return (np.asarray(self.mean, np.uint32) << np.uint32(16)).view(np.float32)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that name the content."""
        longest = _LONGEST.pack(self.longest) if self.longest else b""
        return hashlib.sha256(_SIZES.pack(*self.base.shape) + self._values() + longest).digest()

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
        try:
            written = cache.write(pathlib.Path(path), _MAGIC, _VERSION, said + self._values() + _LONGEST.pack(self.longest))
        except ValueError:  # a NUL in the path
            written = False
        if not written:
            raise CodecError(f"{shown(str(path))} cannot be written")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> tuple[Tables, RecordShape]:
        """Reads what :meth:`save` wrote. Raises CodecError where there is none, or it is damaged or of another version."""
        name = shown(str(path))
        try:
            there = pathlib.Path(path)
            body = cache.read(there, _MAGIC, _VERSION) if there.is_file() else None  # pipes and devices may have no end
            older = cache.read(there, _MAGIC, _WITHOUT_LONGEST) if body is None and there.is_file() else None
            body = body if older is None else older + _LONGEST.pack(0)
        except (OSError, ValueError):  # a name that is too long, or has a NUL
            body = None
        if body is None or len(body) < _SHAPE.size:
            raise CodecError(f"{name} is no file of codec tables of this version, or damaged: see kvortex calibrate --tables")
        layers, heads, head_dim, tokens, order, parts, dtype = _SHAPE.unpack_from(body)
        try:
            shape = RecordShape(layers, heads, head_dim, tokens, ORDERS[order], PARTS[parts], tuple(DTYPES)[dtype])
        except (CodecError, IndexError) as error:
            raise CodecError(f"{name} holds tables of records that cannot be ({error}); calibrate anew") from None
        size, count = (shape.planes, shape.channels), shape.planes * shape.channels
        if len(body) != _SHAPE.size + 4 * count + 8 * BINS + _LONGEST.size:
            raise CodecError(f"{name} holds no tables of {size[0]} planes and {size[1]} channels; calibrate anew")
        base = np.frombuffer(body, np.uint8, count, _SHAPE.size).reshape(size)
        mean = np.frombuffer(body, "<u2", count, _SHAPE.size + count).reshape(size)
        spread = np.frombuffer(body, np.uint8, count, _SHAPE.size + 3 * count).reshape(size)
        counts = np.frombuffer(body, "<u4", 2 * BINS, _SHAPE.size + 4 * count).reshape(2, BINS)
        (longest,) = _LONGEST.unpack(body[-_LONGEST.size :])
        return cls(base.copy(), mean.astype(np.uint16), spread.copy(), counts.astype(np.uint32), longest), shape

    def _values(self) -> bytes:
        return b"".join((
            self.base.tobytes(), self.mean.astype("<u2").tobytes(), self.spread.tobytes(), self.counts.astype("<u4").tobytes(),
        ))  # fmt: skip


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
        finite values, 0 where there are none. ``spread`` and ``counts`` of the same. ``longest`` of these records, where
        ``plane`` can code them.

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
    mean = _means(values, planes, channels)
    return Tables(base, mean, *_spreads(values, mean, shape.parts_of_planes), _longest(records, shape, base))


def _longest(records: Bytes, shape: RecordShape, base: Bytes) -> int:
    """Bytes of the longest record that the plane code makes; 0 where it does not fit them."""
    if shape.tokens % ROWS or shape.channels % CHANNELS:
        return 0
    groups, across = shape.tokens // ROWS, shape.channels // CHANNELS
    form = np.array([groups, across, -(-shape.planes * groups * across // 4) * 4], np.int64)
    out, size, most = np.empty((1, (HEADER_BYTES + shape.raw_bytes) // 4), np.uint32), np.empty(1, np.int64), 0
    for record in records:
        encode_plane(record.view(np.uint16)[None], out, np.zeros(HEADER_BYTES // 4, np.uint32), base, form, size)
        most = max(most, int(size[0]))
    return most


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


def _spreads(
    values: npt.NDArray[np.uint16], mean: npt.NDArray[np.uint16], parts: str
) -> tuple[Bytes, npt.NDArray[np.uint32]]:
    """Spread of each channel, and counts of all."""
    codes, counts = np.empty(mean.shape, np.uint8), np.zeros((2, BINS), np.int64)
    means = (mean.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    for plane, part in enumerate(parts):
        numbers = (values[:, plane].reshape(-1, mean.shape[1]).astype(np.uint32) << np.uint32(16)).view(np.float32)
        finite = np.isfinite(numbers)
        rest = np.where(finite, numbers, 0).astype(np.float64) - np.where(finite, means[plane], 0)
        deviation = np.sqrt((rest**2).sum(0) / np.maximum(1, finite.sum(0)))
        quarters = np.rint(4 * np.log2(np.maximum(deviation, 2.0**-32)))
        codes[plane] = np.clip(quarters + SCALE_ZERO, 0, 255)
        units = rest * FINE / np.exp2((codes[plane].astype(np.float64) - SCALE_ZERO) / 4)
        bins = np.clip(np.rint(units), -FINE * FAR, FINE * FAR).astype(np.int64)[finite] + FINE * FAR
        counts[int(part == "V")] += np.bincount(bins, minlength=BINS)
    return codes, np.minimum(counts, (1 << 32) - 1).astype(np.uint32)
