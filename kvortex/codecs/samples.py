"""A sample of a model's KV, from arrays that a user saved, as records that tables are learnt from."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.codecs.base import Bytes
from kvortex.codecs.shape import RecordShape
from kvortex.errors import CodecError, shown, told

Patterns = npt.NDArray[np.uint16]
_KV_AXES, _LATENT_AXES = 5, 3


def read_sample(path: str | pathlib.Path) -> Patterns:
    """The KV of one sequence, from a file of ``numpy.save``.

    Parameters
    ----------
    path
        Holds (layers, 2, tokens, heads, head_dim), K and V, or (layers, tokens, width), the latent of MLA: bf16 as its
        bit patterns (uint16; ``tensor.view(torch.uint16).numpy()``), as an array of a bfloat16 dtype, or widened to float32.

    Returns
    -------
    numpy.ndarray
        uint16, bf16 bit patterns.

    Raises
    ------
    CodecError
        There is no such file, or its numbers are no bf16.
    """
    name = shown(str(path))
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # no file, no array, or objects
        raise CodecError(f"{name} cannot be read as an array of numpy.save: {told(error)}") from error
    shape: tuple[int, ...] = array.shape if isinstance(array, np.ndarray) else ()
    if len(shape) != _LATENT_AXES and not (len(shape) == _KV_AXES and shape[1] == 2):
        seen = f"shape {shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise CodecError(f"{name}: must be (layers, 2, tokens, heads, head_dim), or (layers, tokens, width) of a latent; "
                         f"seen: {seen}")
    return _patterns(array, name)


def _patterns(array: npt.NDArray[Any], name: str) -> Patterns:
    if array.dtype == np.uint16:
        return array
    if array.dtype.kind == "V" and array.dtype.itemsize == 2 and array.dtype.names is None:  # what NumPy makes of bfloat16
        return np.ascontiguousarray(array).view(np.uint16)
    if array.dtype == np.float32:
        bits = np.ascontiguousarray(array).view(np.uint32)
        if not (bits & np.uint32(0xFFFF)).any():
            return (bits >> np.uint32(16)).astype(np.uint16)
        raise CodecError(f"{name}: float32 numbers that are not bf16: codecs are for models whose KV is bf16")
    raise CodecError(f"{name}: must be bf16, as uint16, a bfloat16 dtype or float32; seen: {shown(str(array.dtype))}")


def records_of(sample: Patterns, order: str = "NHD", tokens: int = 16, skip: int = 16) -> tuple[Bytes, RecordShape]:
    """A sample as records, block by block.

    Parameters
    ----------
    sample
        Of :func:`read_sample`.
    order
        Of the cache's pages: :class:`RecordShape`.
    tokens
        In a block.
    skip
        Tokens at the beginning that are left out: attention sinks are like no others.

    Returns
    -------
    records : (n, raw_bytes) uint8
    shape : RecordShape

    Raises
    ------
    CodecError
        No whole block is left, or a shape cannot be.
    """
    layers, heads, dim = sample.shape[0], sample.shape[-2] if sample.ndim == _KV_AXES else 1, sample.shape[-1]
    parts = "KV" if sample.ndim == _KV_AXES else "L"
    shape = RecordShape(layers, heads, dim, tokens, order, parts)
    planes = sample.reshape(layers, len(parts), -1, heads, dim)[:, :, skip:]
    count = planes.shape[2] // tokens
    if not count:
        raise CodecError(f"{sample.shape} has no block of {tokens} tokens behind the first {skip}, which are left out")
    blocks = planes[:, :, : count * tokens].reshape(layers, len(parts), count, tokens, heads, dim).transpose(2, 0, 1, 3, 4, 5)
    blocks = blocks.swapaxes(3, 4) if order == "HND" else blocks
    return np.ascontiguousarray(blocks).reshape(count, -1).view(np.uint8), shape
