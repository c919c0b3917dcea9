"""A llama-type model in JAX over a paged cache: bf16, one compiled function for all layers, called once a layer.

Once a layer, so that kvortex can come between: before a layer is launched, its pages are waited for (``perf/jax_serving.py``),
and behind it they are saved, once the host has waited for them (``block_until_ready``).

Pages are written in place: a layer's call is given its pages for good (``donate_argnums``) and gives back an array in the same
memory, whose address :class:`perf.jax_pages.JaxPages` compares. A page is ``(key/value, token, head, dim)``, and a layer's
array has pages first, since XLA gathers and scatters along a first axis as it lies, and may transpose the whole array for
any other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.lm.model import Shape
from examples.lm.pages import BLOCK_SIZE
from kvortex.errors import ArgumentError, told

ATTENTIONS = ("cudnn", "pallas", "xla")
CHUNK = 256  # queries at a time of the attention that XLA compiles by itself
Ids = npt.NDArray[np.int32]
Layers = list[Any]  # of JAX arrays, (pages, 2, BLOCK_SIZE, kv_heads, head_dim)
OnLayer = Callable[[int], object]


def _nothing(layer: int) -> None:
    pass


@dataclass(frozen=True)
class Attention:
    """How a prompt attends to itself.

    Attributes
    ----------
    name
        One of ``ATTENTIONS``: cuDNN's, through ``jax.nn.dot_product_attention``; the flash attention that JAX has in Pallas; or
        products and a softmax, ``CHUNK`` queries at a time.
    refused
        What was asked for and did not work here, and why.
    """

    name: str
    refused: tuple[str, ...] = ()


class JaxLlama:
    """Random weights, and the forward pass.

    Parameters
    ----------
    jax
        The module.
    shape
    attention
        From :func:`choose_attention`.
    weights
        By name, in the types to compute with; None for random ones of the scale that training ends with: what is added to the
        residual stream is of the size of ``1 / sqrt(2 * layers)``.
    dtype
        Of random weights and of pages, as a name of NumPy or ml_dtypes.
    """

    def __init__(
        self, jax: Any, shape: Shape, attention: Attention, weights: dict[str, Any] | None = None, dtype: str = "bfloat16"
    ) -> None:
        self.jax, self.shape, self.attention, self.dtype = jax, shape, attention, dtype
        self.weights = _random_weights(jax, shape, dtype) if weights is None else weights
        self._embed, self._layer, self._head = _compiled(jax, shape, attention.name)

    def forward(
        self, tokens: Ids, table: Ids, pages: Layers, before: OnLayer = _nothing, after: OnLayer = _nothing
    ) -> tuple[Any, Any]:
        """Puts the forward pass over the last tokens of a sequence on JAX's stream.

        Parameters
        ----------
        tokens : (n,) int32
            The last ``n`` tokens of the sequence, a multiple of ``BLOCK_SIZE``.
        table : (m,) int32
            All pages of the sequence, of which the last ``n / BLOCK_SIZE`` are written, and the others hold what is before.
        pages
            Of each layer. Each is replaced by an array in the same memory.
        before
            Called with each layer before it is launched: when it returns, the layer's pages hold what is before ``tokens``.
        after
            Called with each layer when it was launched.

        Returns
        -------
        logits : (vocabulary,) float32
        token
            The likeliest; not waited for.
        """
        table = self.jax.device_put(table)  # once, and not for each layer
        x = self._embed(self.weights["embedding"], tokens)
        for layer, weights in enumerate(self.weights["layers"]):
            before(layer)
            x, pages[layer] = self._layer(weights, pages[layer], x, table)
            after(layer)
        found: tuple[Any, Any] = self._head(self.weights["norm"], self.weights["head"], x)
        return found

    def flops(self, count: int) -> float:
        """Operations of a prompt of so many tokens: matrix products, and the half of attention that is not masked."""
        shape, each = self.shape, self.weights["layers"][0]
        weights = sum(each[name].size for name in ("qkv", "output", "gate_up", "down"))
        attention = 4 * shape.heads * shape.head_dim * count * (count + 1) / 2
        return shape.layers * (2.0 * count * weights + attention) + 2.0 * shape.width * shape.vocabulary


@functools.cache  # and so is what they compile to
def _compiled(jax: Any, shape: Shape, attention: str) -> tuple[Any, Any, Any]:
    layer = jax.jit(partial(_layer, jax, shape, attention), donate_argnums=(1, 2))
    return jax.jit(lambda table, tokens: table[tokens]), layer, jax.jit(partial(_head, jax, shape))


def _random_weights(jax: Any, shape: Shape, dtype: str, seed: int = 0) -> dict[str, Any]:
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    make, keys = _maker(jax, dtype), iter(jax.random.split(jax.random.key(seed), 4 * shape.layers + 2))
    added, inner = (2 * shape.layers) ** -0.5, shape.width**-0.5
    ones = jax.numpy.ones(shape.width, dtype)

    def matrix(key: Any, rows: int, columns: int, scale: float) -> Any:
        return make(key, scale, (rows, columns))

    layers = [
        {
            "attention_norm": ones,
            "qkv": matrix(next(keys), shape.width, query + 2 * kv, inner),
            "output": matrix(next(keys), query, shape.width, added * query**-0.5),
            "ffn_norm": ones,
            "gate_up": matrix(next(keys), shape.width, 2 * shape.ffn, inner),
            "down": matrix(next(keys), shape.ffn, shape.width, added * shape.ffn**-0.5),
        }
        for _ in range(shape.layers)
    ]
    embedding = matrix(next(keys), shape.vocabulary, shape.width, 1.0)
    head = matrix(next(keys), shape.width, shape.vocabulary, inner)
    return {"embedding": embedding, "layers": layers, "norm": ones, "head": head}


@functools.cache
def _maker(jax: Any, dtype: str) -> Any:
    def make(key: Any, scale: Any, size: tuple[int, int]) -> Any:
        return jax.random.normal(key, size, dtype) * jax.numpy.asarray(scale, dtype)

    return jax.jit(make, static_argnums=2)


def _layer(jax: Any, shape: Shape, attention: str, w: dict[str, Any], pages: Any, x: Any, table: Any) -> tuple[Any, Any]:
    """One layer over the last rows of a sequence."""
    numpy, rows, context = jax.numpy, len(x), len(table) * BLOCK_SIZE
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    joint = _norm(jax, x, w["attention_norm"], shape.epsilon) @ w["qkv"]
    q, k, v = (part.reshape(rows, -1, shape.head_dim) for part in numpy.split(joint, (query, query + kv), 1))
    at = numpy.arange(context - rows, context)
    q, k = (_rotated(numpy, part, at, shape.rope_base) for part in (q, k))
    blocks = numpy.stack([part.reshape(-1, BLOCK_SIZE, *part.shape[1:]) for part in (k, v)], 1)
    pages = pages.at[table[len(table) - len(blocks) :]].set(blocks, unique_indices=True)
    if rows == context:
        mixed = _PROMPT[attention](jax, q, k, v)
    else:
        seen = (pages[table, part].reshape(context, *k.shape[1:]) for part in (0, 1))  # each in one piece, by one gather
        mixed = _attend(jax, q, *seen, context - rows)
    x = x + mixed.reshape(rows, -1) @ w["output"]
    gate, up = numpy.split(_norm(jax, x, w["ffn_norm"], shape.epsilon) @ w["gate_up"], 2, 1)
    return x + (jax.nn.silu(gate) * up) @ w["down"], pages


def _head(jax: Any, shape: Shape, norm: Any, head: Any, x: Any) -> tuple[Any, Any]:
    last = _norm(jax, x[-1:], norm, shape.epsilon)
    logits = jax.numpy.matmul(last, head, preferred_element_type="float32")[0]
    return logits, logits.argmax()


def _norm(jax: Any, x: Any, weight: Any, epsilon: float) -> Any:
    wide = x.astype("float32")
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + epsilon)).astype(x.dtype) * weight


def _rotated(numpy: Any, part: Any, at: Any, base: float) -> Any:
    """Rotary embedding, (rows, heads, d): the first half of a head is turned with the second."""
    width = part.shape[-1]
    inverse = (base ** (-np.arange(0, width, 2) / width)).astype(np.float32)
    angles = at[:, None, None].astype("float32") * inverse
    cos, sin = numpy.cos(angles), numpy.sin(angles)
    a, b = numpy.split(part.astype("float32"), 2, -1)
    return numpy.concatenate((a * cos - b * sin, b * cos + a * sin), -1).astype(part.dtype)


def _attend(jax: Any, q: Any, k: Any, v: Any, first: Any) -> Any:
    """Queries (t, heads, d) at positions ``first`` and on, keys and values (s, kv_heads, d)."""
    numpy, (rows, heads, width), (context, kv_heads, _) = jax.numpy, q.shape, k.shape
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, width)
    scores = numpy.einsum("tkgd,skd->kgts", grouped, k, preferred_element_type="float32") * np.float32(width**-0.5)
    seen = first + numpy.arange(rows)[:, None] >= numpy.arange(context)
    shares = jax.nn.softmax(numpy.where(seen, scores, -numpy.inf), -1).astype(v.dtype)
    mixed = numpy.einsum("kgts,skd->tkgd", shares, v, preferred_element_type="float32")
    return mixed.reshape(q.shape).astype(q.dtype)


def _by_xla(jax: Any, q: Any, k: Any, v: Any) -> Any:
    rows = math.gcd(len(q), CHUNK)

    def chunk(first: Any) -> Any:
        return _attend(jax, jax.lax.dynamic_slice_in_dim(q, first, rows), k, v, first)

    return jax.lax.map(chunk, jax.numpy.arange(0, len(q), rows)).reshape(q.shape)


def _by_cudnn(jax: Any, q: Any, k: Any, v: Any) -> Any:
    batch = (part[None] for part in (q, k, v))
    return jax.nn.dot_product_attention(*batch, is_causal=True, implementation="cudnn")[0]


def _by_pallas(jax: Any, q: Any, k: Any, v: Any) -> Any:
    from jax.experimental.pallas.ops.gpu import attention

    group = q.shape[1] // k.shape[1]
    k, v = (jax.numpy.repeat(part, group, 1) for part in (k, v))
    return attention.mha(q[None], k[None], v[None], segment_ids=None, sm_scale=q.shape[-1] ** -0.5, causal=True)[0]


_PROMPT: dict[str, Callable[[Any, Any, Any, Any], Any]] = {"cudnn": _by_cudnn, "pallas": _by_pallas, "xla": _by_xla}


def choose_attention(jax: Any, shape: Shape, wanted: str, dtype: str = "bfloat16", rows: int = 512) -> Attention:
    """The one that is wanted if it works here, or else the next of ``ATTENTIONS``, and what it was that did not.

    It works if it compiles, runs, and gives what :func:`_attend` gives for random numbers, but for rounding.
    """
    refused, random = [], jax.random
    keys = random.split(random.key(3), 3)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (random.normal(key, (rows, count, shape.head_dim), dtype) for key, count in zip(keys, heads, strict=True))
    right = np.asarray(jax.jit(partial(_attend, jax, first=0))(q, k, v).astype("float32"))
    for name in ATTENTIONS[ATTENTIONS.index(wanted) :]:
        try:
            found = np.asarray(jax.jit(partial(_PROMPT[name], jax))(q, k, v).astype("float32"))
        except Exception as error:  # whatever a library that was built for another machine raises
            refused.append(f"{name}: {told(error)}")
            continue
        off = float(np.linalg.norm(found - right) / np.linalg.norm(right))
        if off < 0.02:  # bf16 has 8 bits
            return Attention(name, tuple(refused))
        refused.append(f"{name}: is off by {off:.3g} of what it should be")
    raise ArgumentError(f"no attention works here: {'; '.join(refused)}")
