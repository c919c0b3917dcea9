"""Codecs by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvortex.codecs.base import HEADER, HEADER_BYTES, MAGIC, Codec
from kvortex.codecs.cachegen import CacheGenCodec
from kvortex.codecs.lossy import Int8Codec, K4V3Codec, K4V4Codec, K6V4Codec
from kvortex.codecs.plane import PlaneCodec
from kvortex.codecs.raw import RawCodec
from kvortex.codecs.shape import RecordShape
from kvortex.codecs.tables import Tables
from kvortex.errors import CodecError, shown
from kvortex.kernels.plane_form import CHANNELS, ROWS

_KINDS: tuple[type[Codec], ...] = (RawCodec, PlaneCodec, Int8Codec, K6V4Codec, K4V4Codec, K4V3Codec, CacheGenCodec)
CODECS: dict[str, type[Codec]] = {kind.name: kind for kind in _KINDS}


def make_codec(name: str, shape: RecordShape, tables: Tables | None = None, **parameters: Any) -> Codec:
    """A codec for records of one shape.

    Parameters
    ----------
    name
        One of ``CODECS``.
    shape
    tables
        From :func:`kvortex.codecs.calibrate`; every codec but ``raw`` needs them.
    parameters
        Of the codec.

    Raises
    ------
    CodecError
        There is no such codec, or it does not fit the records, the tables or the parameters.
    """
    if name not in CODECS:
        raise CodecError(f"codec = {shown(name)}: must be one of {', '.join(CODECS)}")
    kind: Any = CODECS[name]
    try:
        return kind(shape, **parameters) if kind is RawCodec else kind(shape, tables, **parameters)  # type: ignore[no-any-return]
    except TypeError as error:
        raise CodecError(f"codec {name}: {error}") from error


def lossless_for(shape: RecordShape) -> str:
    """The lossless codec that pays: ``"plane"`` for bf16 in whole tiles, else ``"raw"``.

    fp16 and fp8 gain less than 5 and 20 % by any known code of fixed rate, so they stay as they are.
    """
    fits = shape.dtype == "bfloat16" and not shape.tokens % ROWS and not shape.channels % CHANNELS
    return "plane" if fits else "raw"


def written_by(coded: Any) -> str | None:
    """Name of the codec whose header bytes begin with; None where it is unknown here, or they have none."""
    data = np.frombuffer(coded, np.uint8)
    if data.size < HEADER_BYTES:
        return None
    header = data[:HEADER_BYTES].view(HEADER)[0]
    names = (kind.name for kind in CODECS.values() if (kind.number, kind.version) == (header["codec"], header["version"]))
    return next(names, None) if header["magic"] == MAGIC else None
