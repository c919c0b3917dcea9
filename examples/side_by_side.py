"""The same prompts without and with kvortex, one after the other, and what that gives as a table."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kvortex
from examples.lm.model import Model, Shape
from examples.lm.pages import BLOCK_SIZE
from examples.lm.serving import Answer, Server

COLUMNS = ("prompt", "tokens", "cached", "cold ms", "warm ms", "times", "same tokens", "same bits")
TINY = Shape(layers=3, width=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocabulary=512)


@dataclass(frozen=True)
class Pair:
    """One prompt, answered twice."""

    name: str
    cold: Answer
    warm: Answer

    @property
    def times(self) -> float:
        """How much sooner the first token came."""
        return self.cold.first_token_s / self.warm.first_token_s

    @property
    def same_tokens(self) -> bool:
        """Whether both answers are the same, token by token."""
        return self.cold.tokens == self.warm.tokens

    @property
    def same_bits(self) -> bool:
        """Whether both first tokens were chosen from the same scores, bit by bit."""
        return np.array_equal(self.cold.logits.view(np.uint32), self.warm.logits.view(np.uint32))

    def row(self) -> tuple[str, ...]:
        """Cells of ``COLUMNS``."""
        cold, warm = (f"{answer.first_token_s * 1e3:.0f}" for answer in (self.cold, self.warm))
        sure = ("yes" if same else "NO" for same in (self.same_tokens, self.same_bits))
        return self.name, str(self.warm.prompt_tokens), str(self.warm.cached_tokens), cold, warm, f"{self.times:.1f}", *sure


class SideBySide:
    """Two servers of one model: one computes every prompt whole, the other keeps its blocks in kvortex.

    They take turns on the same pages, so nothing that the cold one has computed is left for the warm one but by accident; and
    what is in a page of another sequence would give other tokens. Use it as a context.
    """

    def __init__(
        self, model: Model, *, name: str, exact: bool = False, num_pages: int = 512, pool_bytes: int = 512 << 20
    ) -> None:
        self.model, self.cache = model, model.new_cache(num_pages)
        config = kvortex.KVortexConfig(
            cpu_pool_size_bytes=pool_bytes, block_size=BLOCK_SIZE, model=name, dtype="bfloat16", device="host"
        )
        self.engine = kvortex.KVortexEngine.create(config, self.cache.layout)
        self.cold, self.warm = (Server(model, self.cache, engine, exact=exact) for engine in (None, self.engine))
        for _ in range(2):  # compiles what is not compiled yet, and meets all of the code once
            self.warm.generate(range(2 * BLOCK_SIZE + 1), 2)

    def ask(self, name: str, prompt: Collection[int], max_new_tokens: int, stop: Collection[int] = ()) -> Pair:
        """Both answers to a prompt."""
        return Pair(name, *(server.generate(prompt, max_new_tokens, stop) for server in (self.cold, self.warm)))

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.shutdown()
        self.model.workers.close()


def table(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    """Aligned text."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = (columns, *rows)
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def arguments(about: str | None, **defaults: Any) -> argparse.Namespace:
    """Options that the programs share."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--tokens", type=int, default=defaults["tokens"], help="new tokens of an answer, at most")
    parser.add_argument("--weights", type=Path, help="a GGUF file of a SmolLM2; by default it is fetched once and kept")
    return parser.parse_args()
