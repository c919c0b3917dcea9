"""A llama-type model, token by token in float64, with the rotary pairs as GGUF files keep them: neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from examples.lm.model import Shape


def logits(shape: Shape, tensors: Mapping[str, Any], tokens: Sequence[int]) -> Any:
    """(n, vocabulary): scores of what follows each token. Keys and values are not rounded."""
    group, width = shape.heads // shape.kv_heads, shape.head_dim
    past: list[tuple[list[Any], list[Any]]] = [([], []) for _ in range(shape.layers)]
    found = []
    for position, token in enumerate(tokens):
        x = tensors["token_embd.weight"][token].astype(np.float64)
        for layer, (keys, values) in enumerate(past):
            part = {name: tensors[f"blk.{layer}.{name}.weight"].astype(np.float64) for name in NAMES}
            h = _norm(x, part["attn_norm"], shape)
            keys.append(_turned((part["attn_k"] @ h).reshape(-1, width), position, shape))
            values.append((part["attn_v"] @ h).reshape(-1, width))
            queries = _turned((part["attn_q"] @ h).reshape(-1, width), position, shape)
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


def _turned(heads: Any, position: int, shape: Shape) -> Any:
    """Neighbours (0, 1), (2, 3) ... rotated as complex numbers."""
    angles = position * shape.rope_base ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    turned = (heads[:, 0::2] + 1j * heads[:, 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], -1).reshape(heads.shape)
