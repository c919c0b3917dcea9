"""Random weights of a small Llama, as GGUF names them, and as the models of ``perf ttft`` take them."""

from __future__ import annotations

from typing import Any

import numpy as np

from examples.lm.model import Shape

SMALL = Shape(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocabulary=64)


def tensors_of(shape: Shape, rng: np.random.Generator) -> dict[str, Any]:
    """Random weights by the names of GGUF, (out, in)."""
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"attn_q": (query, shape.width), "attn_k": (kv, shape.width), "attn_v": (kv, shape.width)}
    sizes |= {"attn_output": (shape.width, query), "ffn_gate": (shape.ffn, shape.width)}
    sizes |= {"ffn_up": (shape.ffn, shape.width), "ffn_down": (shape.width, shape.ffn)}
    found = {"token_embd.weight": rng.standard_normal((shape.vocabulary, shape.width), np.float32)}
    found["output.weight"] = rng.standard_normal((shape.vocabulary, shape.width), np.float32)
    found["output_norm.weight"] = 1 + rng.random(shape.width, np.float32)
    for at in range(shape.layers):
        for name, size in sizes.items():
            found[f"blk.{at}.{name}.weight"] = rng.standard_normal(size, np.float32) / size[1] ** 0.5
        found |= {f"blk.{at}.{name}_norm.weight": 1 + rng.random(shape.width, np.float32) for name in ("attn", "ffn")}
    return {name: tensor.astype(np.float32) for name, tensor in found.items()}


def fused(shape: Shape, tensors: dict[str, Any]) -> dict[str, Any]:
    """The same for :class:`JaxLlama` and torch's yardstick: (in, out), and rotary pairs half a head apart, not neighbours."""

    def halves(matrix: Any) -> Any:
        split = matrix.reshape(-1, shape.head_dim // 2, 2, shape.width)
        return split.swapaxes(1, 2).reshape(matrix.shape)

    def joined(at: int, *names: str) -> Any:
        found = {name: tensors[f"blk.{at}.{name}.weight"] for name in names}
        turned = {name: halves(found[name]) for name in names if name in ("attn_q", "attn_k")}
        return np.ascontiguousarray(np.concatenate(list((found | turned).values())).T)

    layers = [
        {
            "attention_norm": tensors[f"blk.{at}.attn_norm.weight"],
            "qkv": joined(at, "attn_q", "attn_k", "attn_v"),
            "output": joined(at, "attn_output"),
            "ffn_norm": tensors[f"blk.{at}.ffn_norm.weight"],
            "gate_up": joined(at, "ffn_gate", "ffn_up"),
            "down": joined(at, "ffn_down"),
        }
        for at in range(shape.layers)
    ]
    head = np.ascontiguousarray(tensors["output.weight"].T)
    return {"embedding": tensors["token_embd.weight"], "layers": layers, "norm": tensors["output_norm.weight"], "head": head}
