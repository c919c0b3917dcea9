"""Causal attention over a paged cache, for prompts and single tokens alike.

A chunk of queries at a time: one matrix product with all keys that it may see, softmax, one product with the values for each
``SPAN`` of them. The scores of a chunk stay in the CPU's second-level cache, and little is computed that the mask hides. Spans
begin at fixed positions and chunks are independent, so that a token's result has the same bits however many tokens are computed
with it: what was computed with a prompt as a whole, and what is computed behind a cached prefix, are the same.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from examples.lm import kernels
from examples.lm.workers import Workers

Floats = NDArray[np.float32]
CHUNK, SPAN = 64, 256


class Attention:
    """Attention of one model, and the memory it works in, which is kept: fresh pages of the system cost more than the work.

    Parameters
    ----------
    workers
    heads, kv_heads, head_dim
        Of the model. Query head h shares the keys of head ``h * kv_heads // heads``.
    context
        The most positions.
    """

    def __init__(self, workers: Workers, heads: int, kv_heads: int, head_dim: int, context: int) -> None:
        self._workers, self._group, self._context = workers, heads // kv_heads, context
        self._keys, self._values = np.zeros((2, kv_heads, -(-context // SPAN) * SPAN, head_dim), np.float32)
        self._own = threading.local()

    def __call__(
        self, queries: Floats, layer: NDArray[np.uint16], table: NDArray[np.int64], start: int, context: int
    ) -> Floats:
        """What the queries at positions ``start`` and on see.

        Parameters
        ----------
        queries : (heads, rows, d)
            Scaled and rotated.
        layer : (2, pages, block_size, kv_heads, d) uint16
            With all keys and values up to ``context``. Rows whose position is not below ``context`` are padding.

        Returns
        -------
        (rows, heads, d)
        """
        heads, rows, width = queries.shape
        out = np.empty((rows, heads, width), np.float32)
        kv_heads = range(len(self._keys))

        def read(head: int) -> None:
            for part, floats in enumerate((self._keys, self._values)):
                kernels.read_pages(layer[part], table, head, context, floats[head].view(np.uint32))
                floats[head, context : -(-context // SPAN) * SPAN] = 0

        def chunk(head: int, first: int) -> None:
            group, last = slice(head * self._group, (head + 1) * self._group), min(first + CHUNK, rows)
            self._chunk(queries[group, first:last], head, start + first, context, out[first:last, group])

        self._workers.run([lambda head=head: read(head) for head in kv_heads])
        # Long rows first: the workers then end together.
        tasks = [(head, first) for first in reversed(range(0, rows, CHUNK)) for head in kv_heads]
        self._workers.run([lambda head=head, first=first: chunk(head, first) for head, first in tasks])
        return out

    def _chunk(self, queries: Floats, head: int, start: int, context: int, out: Floats) -> None:
        """Queries (g, rows, d) that share a head's keys and values; ``out`` is (rows, g, d)."""
        group, rows, width = queries.shape
        seen = -(-min(start + rows, context) // SPAN) * SPAN
        keys, values, scores = self._keys[head, :seen], self._values[head, :seen], self._scores(group * rows, seen)
        with np.errstate(invalid="ignore", over="ignore"):  # a block that failed to load may hold anything
            np.matmul(queries.reshape(group * rows, width), keys.T, out=scores)
            kernels.mask_future(scores, rows, start)
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            total = scores[:, :SPAN] @ values[:SPAN]
            for first in range(SPAN, seen, SPAN):
                total += scores[:, first : first + SPAN] @ values[first : first + SPAN]
        kernels.divide_by_sums(scores, rows, start, total, out)

    def _scores(self, rows: int, columns: int) -> Floats:
        """Memory of this thread."""
        kept = getattr(self._own, "scores", None)
        if kept is None or kept.size < rows * columns:
            most = self._group * CHUNK * (-(-self._context // SPAN) * SPAN)
            kept = self._own.scores = np.empty(max(rows * columns, min(most, 2 * rows * columns)), np.float32)
        return kept[: rows * columns].reshape(rows, columns)
