"""A model of the llama or Qwen2 type, token by token in float64, as GGUF files keep them.

Rotary pairs are neighbours in llama, and a head's halves in Qwen2 (``halves``), where queries, keys and values have a bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from examples.lm.model import Shape


def logits(shape: Shape, tensors: Mapping[str, Any], tokens: Sequence[int], *, halves: bool = False) -> Any:
    """(n, vocabulary): scores of what follows each token. Keys and values are not rounded."""
    group, width = shape.heads // shape.kv_heads, shape.head_dim
    past: list[tuple[list[Any], list[Any]]] = [([], []) for _ in range(shape.layers)]
    found = []
    for position, token in enumerate(tokens):
        x = tensors["token_embd.weight"][token].astype(np.float64)
        for layer, (keys, values) in enumerate(past):
            part = {name: tensors[f"blk.{layer}.{name}.weight"].astype(np.float64) for name in NAMES}
            h = _norm(x, part["attn_norm"], shape)
            query, key, value = (
                (part[name] @ h + tensors.get(f"blk.{layer}.{name}.bias", 0.0)).reshape(-1, width) for name in NAMES[1:4]
            )
            keys.append(_turned(key, position, shape, halves))
            values.append(value)
            queries = _turned(query, position, shape, halves)
            mixed = []
            for head, query in enumerate(queries):
                scores = np.array([query @ key[head // group] for key in keys]) / np.sqrt(width)
                weights = np.exp(scores - scores.max())
                mixed.append(sum(w * value[head // group] for w, value in zip(weights / weights.sum(), values, strict=True)))
            x = x + part["attn_output"] @ np.concatenate(mixed)
            h = _norm(x, part["ffn_norm"], shape)
            gate = part["ffn_gate"] @ h
            x = x + part["ffn_down"] @ (gate / (1 + np.exp(-gate)) * (part["ffn_up"] @ h))
        head_weight = tensors.get("output.weight", tensors["token_embd.weight"])
        found.append(head_weight @ _norm(x, tensors["output_norm.weight"], shape))
    return np.array(found)


NAMES = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def _norm(x: Any, weight: Any, shape: Shape) -> Any:
    return x / np.sqrt((x * x).mean() + shape.epsilon) * weight


def _turned(heads: Any, position: int, shape: Shape, halves: bool) -> Any:
    """Pairs rotated as complex numbers: (0, 1), (2, 3) ... or (0, d / 2), (1, d / 2 + 1) ..."""
    angles = position * shape.rope_base ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    pairs = heads.reshape(len(heads), 2, -1).swapaxes(1, 2) if halves else heads.reshape(len(heads), -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    both = np.stack([turned.real, turned.imag], -1)
    return (both.swapaxes(1, 2) if halves else both).reshape(heads.shape)
