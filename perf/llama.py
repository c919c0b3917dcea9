"""The example's model with its K and V in plain sight: weights from a GGUF file, float32, K and V rounded to bf16.

K is as vLLM caches it: after RoPE, in rotate-half order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.lm.download import WeightsError, fetch_weights
from examples.lm.pages import BLOCK_SIZE, PagedCache
from kvortex.errors import ArgumentError, told
from kvortex.kernels.cache import cache_folder

Floats = npt.NDArray[np.float32]
Cache = list[tuple[Floats, Floats]]  # K and V of each layer, (tokens, heads, head_dim)


def weights() -> Path:
    """The file of ``examples.lm.download``, fetched once and kept in the cache folder."""
    try:
        return fetch_weights(cache_folder() / "weights")
    except WeightsError as error:
        raise ArgumentError(str(error)) from error


def bf16(numbers: Floats) -> Floats:
    """Rounded to the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).view(np.float32)


class Llama:
    """A model and its tokenizer; needs the packages ``gguf`` and ``tokenizers``, of the extra ``examples``."""

    def __init__(self, path: Path) -> None:
        try:
            from examples.lm.gguf_file import read_gguf
        except ImportError as error:
            raise ArgumentError(f"a model needs gguf and tokenizers, of the extra examples: {error}") from None
        try:
            self._model, self._chat = read_gguf(path)
        except (OSError, ValueError, KeyError) as error:
            raise ArgumentError(f"{path.name} is no model that can be read here: {told(error)}") from error
        shape = self._model.shape
        self.layers, self.kv_heads, self.dim = shape.layers, shape.kv_heads, shape.head_dim

    def close(self) -> None:
        """Ends its threads, and gives BLAS its own back."""
        self._model.workers.close()

    def tokens(self, text: str) -> npt.NDArray[np.int64]:
        """Ids of a text."""
        return np.array(self._chat.encode(text))

    def forward(self, ids: npt.NDArray[np.int64], past: Cache | None = None, *, scores: bool = True) -> tuple[Any, Cache]:
        """Logits of every token (None without ``scores``), and the K and V of these tokens."""
        begin = 0 if past is None else len(past[0][0])
        cache = self._model.new_cache(-(-(begin + len(ids)) // BLOCK_SIZE))
        for layer, pair in zip(cache.layers, past, strict=True) if past is not None else ():
            for rows, floats in zip(_rows(layer), pair, strict=True):
                rows[:begin] = bf16(floats).view(np.uint32) >> 16
        found = self._model.forward(ids, begin, np.arange(cache.free_pages), cache, every=scores)
        return found if scores else None, _read(cache, begin, begin + len(ids))


def _rows(layer: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """(2, tokens, heads, d), the same memory: pages that lie in the order of their tokens."""
    return layer.reshape(2, -1, *layer.shape[3:])


def _read(cache: PagedCache, first: int, last: int) -> Cache:
    both = ((_rows(layer)[:, first:last].astype(np.uint32) << 16).view(np.float32) for layer in cache.layers)
    return [(k, v) for k, v in both]
