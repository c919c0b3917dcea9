"""The model's paged KV cache: what would be VRAM on a GPU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import kvortex

BLOCK_SIZE = 16


class OutOfPagesError(RuntimeError):
    """A sequence needs more pages than are free."""


class PagedCache:
    """Pages of ``BLOCK_SIZE`` tokens, and which of them are free.

    Attributes
    ----------
    layers
        For each layer (2, pages, BLOCK_SIZE, kv_heads, head_dim) uint16: keys and values in bfloat16.
    layout
        The same for kvortex.
    """

    def __init__(self, num_layers: int, kv_heads: int, head_dim: int, num_pages: int) -> None:
        shape = (2, num_pages, BLOCK_SIZE, kv_heads, head_dim)
        self.layers = [np.zeros(shape, np.uint16) for _ in range(num_layers)]
        self.layout = kvortex.KVLayout.from_arrays(self.layers, block_axis=1, order="NHD")
        self._free = list(range(num_pages))

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def take(self, tokens: int) -> NDArray[np.int64]:
        """Pages for a sequence of so many tokens, in the order of its tokens. OutOfPagesError where too few are free."""
        count = -(-tokens // BLOCK_SIZE)
        if count > len(self._free):
            raise OutOfPagesError(f"{tokens} tokens need {count} pages, and {len(self._free)} are free")
        taken, self._free = self._free[:count], self._free[count:]
        return np.array(taken, np.int64)

    def give_back(self, pages: NDArray[np.int64]) -> None:
        """The pages' next user overwrites them: no transfer may still be at work on them."""
        self._free += pages.tolist()
