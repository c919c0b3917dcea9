"""For slow tiers: uniform steps by plane, entropy-coded with tables that are learnt once for a model.

Of CacheGen (Liu et al., SIGCOMM 2024) this keeps quantization that knows layers and channels, an entropy coder that a GPU
can run in parallel, distributions that are profiled once for a model and are in no record, and several levels of quality.
It leaves out anchors and differences to them, which cost bits once a channel's mean is known, and coarser steps for deeper
layers, which no measurement of ours supports (docs/codecs.md).

A step is a part of the root mean square of a plane's spreads, as the nearest quarter power of two. What a channel's steps look
like is one of some distributions: the sample's own, as wide as the channel is in steps. :mod:`kvortex.codecs._ranges` has the
coder.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.codecs._lossy import scales
from kvortex.codecs._ranges import PROBABILITY_BITS, decode_ranges, encode_ranges
from kvortex.codecs.base import HEADER_BYTES, Flags, Int64s
from kvortex.codecs.lossy import BoundedCodec
from kvortex.codecs.plane import PlaneCodec
from kvortex.codecs.shape import RecordShape
from kvortex.codecs.tables import BINS, FAR, FINE, SCALE_ZERO, Tables
from kvortex.errors import CodecError, shown

# Steps of K (or of a latent) and of V, as parts of the root mean square, by level: from fine to coarse.
LEVELS = ((0.2, 0.3), (0.35, 0.42), (0.74, 0.9))
_NARROW, _WIDE = -16, 24  # quarter octaves of a spread in steps, that there are distributions for
_KINDS = _WIDE - _NARROW + 1
_MOST = 127
_LEAST_VALUES = 1 << 15  # of a stream, so that 32 states weigh little
_BUDGET = 0.3


class CacheGenCodec(BoundedCodec):
    """See the module.

    Parameters
    ----------
    shape
        Of bf16 records, as :class:`~kvortex.codecs.plane.PlaneCodec` takes them; also of a latent, of which nothing was
        measured.
    tables
        For as many planes and channels, with ``spread`` and ``counts``.
    level
        0 to 2, from fine to coarse.

    Raises
    ------
    CodecError
        The code does not fit these records, the tables do not, or there is no such level.
    """

    name, number = "cachegen", 6

    def __init__(self, shape: RecordShape, tables: Tables, *, level: int = 1) -> None:
        self._plane = PlaneCodec(shape, tables, budget=1)
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < len(LEVELS):
            raise CodecError(f"level = {shown(level)}: must be an integer from 0 to {len(LEVELS) - 1}")
        if not tables.counts[: len(shape.parts)].sum(1).all():
            raise CodecError("the tables say nothing of distributions; calibrate anew")
        self.shape, self.tables, self.level = shape, tables, level
        self.worst_bytes = HEADER_BYTES + self._plane.worst_bytes
        self.slot_bytes = min(self.worst_bytes, max(HEADER_BYTES, int(shape.raw_bytes * _BUDGET) & ~15))
        parts = np.array([part == "V" for part in shape.parts_of_planes], np.int64)
        codes = np.array([_step_code(row, LEVELS[level][part]) for row, part in zip(tables.spread, parts, strict=True)])
        wide = np.clip(tables.spread.astype(np.int64) - codes[:, None], _NARROW, _WIDE) - _NARROW
        self._kinds = (wide + _KINDS * parts[:, None]).astype(np.uint8)
        self._step = scales()[codes]
        self._most, self._starts = _shares(tables.counts)
        each = shape.tokens * shape.channels
        self._form = np.array([min(shape.planes, -(-_LEAST_VALUES // each))], np.int64)

    def parameters(self) -> bytes:
        return self.tables.digest + hashlib.sha256(b"".join(part.tobytes() for part in self.compiled)).digest()

    @property
    def stream_planes(self) -> int:
        """Planes of a stream."""
        return int(self._form[0])

    @property
    def streams(self) -> int:
        """Streams of a record."""
        return -(-self.shape.planes // self.stream_planes)

    @property
    def kept(self) -> PlaneCodec:
        """Codes what is kept exactly."""
        return self._plane

    @cached_property
    def compiled(self) -> tuple[Any, ...]:
        """What compiled functions take of a codec: see :func:`kvortex.codecs._ranges.encode_ranges`."""
        return self._form, self.tables.means, self._step, self._kinds, self._most, self._starts

    def _encode_bodies(self, planes: npt.NDArray[np.uint16], room: npt.NDArray[np.uint32], coded: Flags) -> Int64s:
        sizes = np.zeros(len(planes), np.int64)
        encode_ranges(planes, room, HEADER_BYTES // 4, *self.compiled, coded, sizes)
        coded &= 4 * sizes <= self.worst_bytes  # else plane is shorter, and keeps every bit
        return 4 * sizes

    def _decode_bodies(
        self, words: npt.NDArray[np.uint32], planes: npt.NDArray[np.uint16], used: Int64s, wanted: Flags
    ) -> None:
        wanted &= used % 4 == 0
        decode_ranges(words, used // 4, planes, HEADER_BYTES // 4, *self.compiled, wanted)


def _step_code(spread: npt.NDArray[np.uint8], part: float) -> int:
    """Code of the step of a plane. Summed exactly, so that it is the same on every machine."""
    table = scales().astype(np.float64)
    wanted = part * math.sqrt(math.fsum((table[spread] ** 2).tolist()) / len(spread))
    return int(np.argmin(np.abs(table - wanted)))


def _shares(counts: npt.NDArray[np.uint32]) -> tuple[Int64s, npt.NDArray[np.uint16]]:
    """Of each distribution the most steps that have a symbol, and where each symbol's share of 2**14 begins."""
    ratios = scales().astype(np.float64)[SCALE_ZERO + np.arange(_NARROW, _WIDE + 1)]
    most = np.minimum(_MOST, np.ceil(6 * ratios).astype(np.int64) + 1)
    whole = 1 << PROBABILITY_BITS
    starts = np.full((2 * _KINDS, 2 * _MOST + 3), whole, np.uint16)
    away = np.arange(BINS) - FINE * FAR
    for part in range(2):
        both = counts[part].astype(np.int64) + counts[part][::-1]  # either side teaches of the other
        for kind, (ratio, far) in enumerate(zip(ratios, most.tolist(), strict=True)):
            symbols = np.minimum(np.abs(np.rint(away * (ratio / FINE))), far + 1).astype(np.int64)
            sums = np.bincount(symbols, weights=both, minlength=far + 2).astype(np.int64)
            seen = np.concatenate((sums[far:0:-1] // 2, sums[:1], sums[1 : far + 1] // 2, sums[far + 1 :]))
            shares = 1 + seen * (whole - len(seen)) // max(1, int(seen.sum()))
            shares[np.argmax(shares)] += whole - shares.sum()
            starts[part * _KINDS + kind, : len(shares) + 1] = np.concatenate(([0], np.cumsum(shares)))
    return np.tile(most, 2), starts
