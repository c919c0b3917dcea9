"""Models that ``perf ttft`` computes, by name."""

from __future__ import annotations

from examples.lm.model import Shape
from examples.side_by_side import TINY

LLAMA_8B = Shape(32, 4096, 32, 8, 128, 14336, 128256, rope_base=500_000.0, context=32768)  # Meta-Llama-3-8B's config.json
SHAPES = {"8b": LLAMA_8B, "tiny": TINY}
