"""The yardstick of ``perf ttft``: how long torch takes for the same prefill, by its own attention.

``python -m perf.torch_llama --shape 8b --device cuda:0 --tokens 4096,32768`` in a process of its own, whose memory is free
again when the other model's is taken. Eager, bf16, random weights of the same sizes; scaled dot product attention by each fused
kernel that works here, and the fastest counts. Its last line is JSON: seconds by tokens, and which attention they are of.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from examples.lm.model import Shape
from perf.shapes import SHAPES

Attend = Callable[[Any, Any, Any], Any]  # of (1, heads, n, d), (1, kv_heads, n, d) twice


class TorchLlama:
    """The same layers as :class:`perf.jax_llama.JaxLlama`; what it has no use for, the keys and values, it drops."""

    def __init__(self, torch: Any, shape: Shape, device: str, weights: dict[str, Any] | None = None) -> None:
        self.torch, self.shape, self.device = torch, shape, device
        self.weights = _random_weights(torch, shape, device) if weights is None else weights

    def prefill(self, tokens: Any, attend: Attend) -> Any:
        """(vocabulary,): scores of what follows."""
        torch, shape, w = self.torch, self.shape, self.weights
        x, (cos, sin) = w["embedding"][tokens], self._turns(len(tokens))
        sizes = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        for layer in w["layers"]:
            joint = self._norm(x, layer["attention_norm"]) @ layer["qkv"]
            q, k, v = (part.view(1, len(tokens), -1, shape.head_dim).transpose(1, 2) for part in joint.split(sizes, 1))
            mixed = attend(_rotated(torch, q, cos, sin), _rotated(torch, k, cos, sin), v)
            x = x + mixed.transpose(1, 2).reshape(len(tokens), -1) @ layer["output"]
            gate, up = (self._norm(x, layer["ffn_norm"]) @ layer["gate_up"]).chunk(2, 1)
            x = x + (torch.nn.functional.silu(gate) * up) @ layer["down"]
        return (self._norm(x[-1:], w["norm"]) @ w["head"])[0]

    def _norm(self, x: Any, weight: Any) -> Any:
        return self.torch.nn.functional.rms_norm(x, weight.shape, weight, self.shape.epsilon)

    def _turns(self, count: int) -> tuple[Any, Any]:
        torch, width = self.torch, self.shape.head_dim
        inverse = self.shape.rope_base ** (-torch.arange(0, width, 2, device=self.device, dtype=torch.float64) / width)
        angles = torch.arange(count, device=self.device, dtype=torch.float64)[:, None] * inverse
        dtype = self.weights["norm"].dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _random_weights(torch: Any, shape: Shape, device: str) -> dict[str, Any]:
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ones = torch.ones(shape.width, device=device, dtype=torch.bfloat16)

    def matrix(rows: int, columns: int) -> Any:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16).mul_(rows**-0.5)

    layers = [
        {
            "attention_norm": ones,
            "qkv": matrix(shape.width, query + 2 * kv),
            "output": matrix(query, shape.width),
            "ffn_norm": ones,
            "gate_up": matrix(shape.width, 2 * shape.ffn),
            "down": matrix(shape.ffn, shape.width),
        }
        for _ in range(shape.layers)
    ]
    return {
        "embedding": torch.randn(shape.vocabulary, shape.width, device=device, dtype=torch.bfloat16),
        "layers": layers,
        "norm": ones,
        "head": matrix(shape.width, shape.vocabulary),
    }


def _rotated(torch: Any, part: Any, cos: Any, sin: Any) -> Any:
    a, b = part.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attentions(torch: Any, device: str) -> dict[str, Attend]:
    """Ways to attend, by name: of a GPU each fused kernel alone, so that none falls back to another unseen."""
    attend = torch.nn.functional.scaled_dot_product_attention
    if not device.startswith("cuda"):
        return {"sdpa": lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=True)}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def way(backend: Any, grouped: bool) -> Attend:
        def run(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel([backend]):
                if grouped:
                    return attend(q, k, v, is_causal=True, enable_gqa=True)
                k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
                return attend(q, k, v, is_causal=True)

        return run

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    grouped = {name: way(backend, True) for name, backend in backends.items()}
    return grouped | {f"{name}, heads repeated": way(backend, False) for name, backend in backends.items()}


def measured(torch: Any, model: TorchLlama, sizes: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds and attention by size, and which attention did not work, and why; each time with one size more."""
    ways = attentions(torch, model.device)
    seconds: dict[int, float] = {}
    chosen: dict[int, str] = {}
    refused: dict[str, str] = {}
    for size in sizes:
        tokens = torch.randint(model.shape.vocabulary, (size,), device=model.device)
        for name, attend in ways.items():
            if name in refused or (name.endswith("repeated") and name.split(",")[0] not in refused):
                continue  # heads are repeated only where a kernel takes no groups
            try:
                model.prefill(tokens, attend).argmax().item()
            except RuntimeError as error:
                refused[name] = str(error).splitlines()[0][:200]
                continue
            times = []
            for _ in range(rounds):
                began = time.perf_counter()
                model.prefill(tokens, attend).argmax().item()
                times.append(time.perf_counter() - began)
            found = statistics.median(times)
            print(f"torch, {size} tokens, {name}: {found * 1e3:.1f} ms …", file=sys.stderr, flush=True)
            if found < seconds.get(size, float("inf")):
                seconds[size], chosen[size] = found, name
        yield {"version": torch.__version__, "seconds": seconds, "attention": chosen, "refused": refused}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    try:
        import torch
    except Exception as error:  # one that does not fit the machine fails in its own way
        print(json.dumps({"not_compared": f"torch cannot be imported: {error}"}))
        return 0
    device = "cpu" if arguments.device == "host" else arguments.device
    with torch.no_grad():
        model = TorchLlama(torch, SHAPES[arguments.shape], device)
        sizes = [int(size) for size in arguments.tokens.split(",")]
        for found in measured(torch, model, sizes, arguments.rounds):
            print(json.dumps(found), flush=True)  # after each size: what is known counts, should a larger one not fit
    return 0


if __name__ == "__main__":
    sys.exit(main())
