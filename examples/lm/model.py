"""A llama-type model: RMSNorm, grouped attention with rotary embedding, SwiGLU. float32, keys and values in bfloat16.

Queries, keys and values may have a bias, as Qwen2's do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.lm import kernels
from examples.lm.attention import Attention, Floats
from examples.lm.pages import PagedCache
from examples.lm.workers import Workers

ROWS = 32  # a prompt is computed in multiples of so many rows: see Model.forward
OnLayer = Callable[[int], object]


def _nothing(layer: int) -> None:
    pass


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    rope_base: float = 10_000.0
    epsilon: float = 1e-5
    context: int = 2048


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, each (out, in) float32; those that have the same input are one matrix."""

    attention_norm: Floats
    qkv: Floats
    bias: Floats | None  # of qkv
    output: Floats
    ffn_norm: Floats
    gate_up: Floats
    down: Floats


class Model:
    """Weights, and the forward pass over a paged cache.

    Parameters
    ----------
    shape
    tensors
        By the names of GGUF, (out, in) float32: ``token_embd.weight``, ``blk.0.attn_q.weight`` and so on, rotary halves as in
        llama. The head is the embedding where there is no ``output.weight``.
    workers
        None for one thread a CPU.
    """

    def __init__(self, shape: Shape, tensors: Mapping[str, Floats], workers: Workers | None = None) -> None:
        self.shape, self.workers = shape, workers or Workers()
        self._embedding = np.ascontiguousarray(tensors["token_embd.weight"])
        self._head = np.ascontiguousarray(tensors.get("output.weight", self._embedding))
        self._norm = tensors["output_norm.weight"]
        self._layers = [_layer(tensors, f"blk.{at}.") for at in range(shape.layers)]
        inverse = shape.rope_base ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = np.arange(shape.context + ROWS)[:, None] * inverse
        self._attention = Attention(self.workers, shape.heads, shape.kv_heads, shape.head_dim, shape.context)
        self._cos, self._sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def flops(self, count: int) -> float:
        """Operations that a prompt of so many tokens takes: matrix products, and the half of attention that is not masked."""
        shape, layer = self.shape, self._layers[0]
        weights = sum(weight.size for weight in (layer.qkv, layer.output, layer.gate_up, layer.down))
        attention = 4 * shape.heads * shape.head_dim * count * (count + 1) / 2
        return shape.layers * (2.0 * count * weights + attention) + 2.0 * self._head.size

    @classmethod
    def random(cls, shape: Shape, seed: int = 0) -> Model:
        """A model of any size to try things with."""
        rng = np.random.default_rng(seed)
        query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sizes = {"attn_q": (query, shape.width), "attn_k": (kv, shape.width), "attn_v": (kv, shape.width)}
        sizes |= {"attn_output": (shape.width, query), "ffn_gate": (shape.ffn, shape.width)}
        sizes |= {"ffn_up": (shape.ffn, shape.width), "ffn_down": (shape.width, shape.ffn)}

        def matrix(rows: int, columns: int) -> Floats:
            return rng.standard_normal((rows, columns), np.float32) * np.float32(1.5 / columns**0.5)

        tensors: dict[str, Floats] = {"token_embd.weight": rng.standard_normal((shape.vocabulary, shape.width), np.float32)}
        tensors["output.weight"] = matrix(shape.vocabulary, shape.width)
        tensors["output_norm.weight"] = np.ones(shape.width, np.float32)
        for at in range(shape.layers):
            tensors |= {f"blk.{at}.{name}.weight": matrix(*size) for name, size in sizes.items()}
            tensors |= {f"blk.{at}.{name}_norm.weight": np.ones(shape.width, np.float32) for name in ("attn", "ffn")}
        return cls(shape, tensors)

    def new_cache(self, num_pages: int) -> PagedCache:
        """Pages for this model."""
        return PagedCache(self.shape.layers, self.shape.kv_heads, self.shape.head_dim, num_pages)

    def forward(
        self,
        tokens: NDArray[np.int64],
        start: int,
        table: NDArray[np.int64],
        cache: PagedCache,
        before: OnLayer = _nothing,
        after: OnLayer = _nothing,
        exact: bool = False,
        every: bool = False,
    ) -> Floats:
        """Computes tokens at positions ``start`` and on, and writes their keys and values into the sequence's pages.

        Prompts are computed in multiples of ``ROWS`` rows, the last ones of which may be padding: products are then large
        enough for OpenBLAS to add them up in one order whichever rows are beside a row, and a row has the same bits
        behind a prefix that was loaded as behind one that was computed. A single token, while decoding, is a product of a
        matrix and a vector, which is faster, and whose sums may differ in their last bits: see ``exact``.

        Parameters
        ----------
        tokens : (n,) integers
        start
            Position of the first; the pages hold what is before it.
        table
            The sequence's pages.
        before
            Called with each layer before the pages of what is before ``start`` are read.
        after
            Called with each layer when its pages are written.
        exact
            Compute a single token in ``ROWS`` rows as well, at less than half the speed: it gets the bits that it has in a
            prompt.
        every
            Give the scores behind every token.

        Returns
        -------
        (vocabulary,) float32, or (n, vocabulary) with ``every``
            Scores of what follows the last token.
        """
        count, shape = len(tokens), self.shape
        if not 0 < count <= shape.context - start:
            raise ValueError(f"{count} tokens from position {start} on; the model's context is {shape.context}")
        rows = 1 if count == 1 and not exact else -(-count // ROWS) * ROWS
        x = np.zeros((rows, shape.width), np.float32)
        x[:count] = self._embedding[tokens]
        for at, layer in enumerate(self._layers):
            queries = self._queries_and_pages(layer, cache.layers[at], x, start, count, table)
            before(at)
            mixed = self._attention(queries, cache.layers[at], table, start, start + count)
            x += self._product(mixed.reshape(rows, -1), layer.output)
            after(at)
            x += self._feed_forward(layer, x)
        scores = self._product(self._normed(x[0 if every else count - 1 : count], self._norm), self._head)
        return scores if every else scores[0]

    def _queries_and_pages(
        self, layer: Layer, pages: NDArray[np.uint16], x: Floats, start: int, count: int, table: NDArray[np.int64]
    ) -> Floats:
        """Queries, (heads, rows, d); keys and values go to their pages."""
        heads, kv_heads, width, rows = self.shape.heads, self.shape.kv_heads, self.shape.head_dim, len(x)
        qkv = self._product(self._normed(x, layer.attention_norm), layer.qkv)
        if layer.bias is not None:
            qkv += layer.bias
        qkv = qkv.reshape(rows, heads + 2 * kv_heads, width)
        rotated = np.empty((heads + kv_heads, rows, width), np.float32)
        kernels.rotate(qkv[:, :heads], self._cos, self._sin, start, np.float32(width**-0.5), rotated[:heads])
        kernels.rotate(qkv[:, heads : heads + kv_heads], self._cos, self._sin, start, np.float32(1), rotated[heads:])
        values = np.ascontiguousarray(qkv[:, heads + kv_heads :].swapaxes(0, 1))
        for part, new in enumerate((rotated[heads:], values)):
            kernels.write_pages(new.view(np.uint32), pages[part], table, start, count)
        return rotated[:heads]

    def _feed_forward(self, layer: Layer, x: Floats) -> Floats:
        both = self._product(self._normed(x, layer.ffn_norm), layer.gate_up)
        gate, up = both[:, : self.shape.ffn], both[:, self.shape.ffn :]
        hidden = np.empty(gate.shape, np.float32)

        def swiglu(part: slice) -> None:
            out = hidden[part]
            with np.errstate(over="ignore"):  # exp(-x) of a very negative x: the gate is shut
                np.exp(-gate[part], out=out)
            out += 1
            np.divide(gate[part], out, out=out)
            out *= up[part]

        self.workers.run([lambda part=part: swiglu(part) for part in self.workers.split(len(x))])
        return self._product(hidden, layer.down)

    def _normed(self, x: Floats, weight: Floats) -> Floats:
        out = np.empty_like(x)
        epsilon = np.float32(self.shape.epsilon)
        parts = self.workers.split(len(x))
        self.workers.run([lambda part=part: kernels.rms_norm(x[part], weight, epsilon, out[part]) for part in parts])
        return out

    def _product(self, x: Floats, weight: Floats) -> Floats:
        """``x @ weight.T``; each worker computes some of the columns, since a prompt may have few rows."""
        out = np.empty((len(x), len(weight)), np.float32)
        parts = self.workers.split(len(weight))
        self.workers.run([lambda part=part: np.matmul(x, weight[part].T, out=out[:, part]) for part in parts])
        return out


def _layer(tensors: Mapping[str, Any], prefix: str) -> Layer:
    def stacked(*names: str, part: str = "weight") -> Floats:
        return np.concatenate([tensors[f"{prefix}{name}.{part}"] for name in names]).astype(np.float32, copy=False)

    biased = prefix + "attn_q.bias" in tensors
    return Layer(
        attention_norm=tensors[prefix + "attn_norm.weight"],
        qkv=stacked("attn_q", "attn_k", "attn_v"),
        bias=stacked("attn_q", "attn_k", "attn_v", part="bias") if biased else None,
        output=stacked("attn_output"),
        ffn_norm=tensors[prefix + "ffn_norm.weight"],
        gate_up=stacked("ffn_gate", "ffn_up"),
        down=stacked("ffn_down"),
    )
