"""How soon does a real model answer when its prompt's beginning is cached, and is the answer the same?

The server of ``examples/``, on the CPU: SmolLM2-135M, float32, keys and values in bfloat16; five questions about a document
of 1,500 tokens. Each is answered three ways by turns: computed whole without kvortex (``cold_ms``), computed whole while its
blocks are saved behind the forward pass (``saving_ms``), and with the document loaded (``hit_ms``); ratios named ``cpu`` are
those of CPU seconds of whole requests, which what else runs on the machine changes less.

``saving_share`` is what saving takes by itself, against a cold request: CPU seconds of kvortex's threads and of the calls into
it. The ratio of two requests has all that saving causes, but cannot be told so well: the notes have its median over all pairs,
which take turns at being first, and an interval that holds the true median with a confidence of 95 % (by ranks).

Then 64 tokens of each answer are compared: cold, with a hit, and with a bit of a cached block flipped; and the pages, with what
was saved.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import kvortex
from examples.lm.download import WeightsError, fetch_weights
from examples.lm.model import Model
from examples.lm.pages import BLOCK_SIZE
from examples.lm.serving import Server
from examples.side_by_side import TINY, SideBySide
from kvortex.errors import ArgumentError
from perf.meter import Meter, calls_of, threads_of
from perf.report import Report, progress

KEYS = ("prompt",)
BETTER = {"cold_ms": "lower", "hit_ms": "lower", "speedup": "higher", "speedup_cpu": "higher"} | {
    "saving_ratio": "lower",
    "saving_ratio_cpu": "lower",
    "saving_share": "lower",
}
COLUMNS = (
    *(*KEYS, "tokens", "cached", "cold_ms", "saving_ms", "hit_ms", "speedup", "speedup_cpu"),
    *("saving_ratio", "saving_ratio_cpu", "saving_share"),
    *("same_tokens", "same_bits", "recomputed", "same_tokens_recomputed", "wrong_bytes"),
)
ROUNDS, NEW_TOKENS = 5, 64
Prompts = tuple[list[int], list[list[int]]]


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a prompt, and how near the prefill comes to the CPU's rate of matrix products."""
    if device_name.startswith("cuda"):
        raise ArgumentError(f"--device {device_name}: the model of this measurement computes on the CPU; pass host")
    model, (prefix, prompts), name = _tiny() if quick else _real()
    rounds, new_tokens = (1, 8) if quick else (ROUNDS, NEW_TOKENS)
    with SideBySide(model, name=name, num_pages=3 * -(-(len(prefix) + 200) // BLOCK_SIZE)) as sides:
        notes = {"model": name, "threads": model.workers.count, "prefix_tokens": len(prefix), "new_tokens": new_tokens}
        notes["load_average"] = os.getloadavg()[0]  # more than the threads: others computed as well
        notes |= _rates(model, sides, prefix, rounds)
        rows: list[dict[str, Any]] = []
        pairs: list[float] = []
        for number, prompt in enumerate(prompts, 1):
            progress(f"prompt {number} of {len(prompts)}")
            saved = _save_prefix(sides, prefix)
            row = {"prompt": number, "tokens": len(prompt)} | _times(sides, prefix, prompt, number, rounds, pairs)
            row["wrong_bytes"] = _wrong_bytes(sides, prefix, saved)
            rows.append(row | _answers(sides, prompt, len(prefix), new_tokens))
    for column in BETTER:
        notes[f"median_{column}"] = statistics.median(row[column] for row in rows)
    notes |= {"saving_pairs": len(pairs), "saving_pairs_median_cpu": statistics.median(pairs)}
    notes |= dict(zip(("saving_pairs_low_cpu", "saving_pairs_high_cpu"), interval(pairs), strict=True))
    return "host", rows, notes


def _real() -> tuple[Model, Prompts, str]:
    try:
        from examples import document
        from examples.lm.gguf_file import read_gguf

        path = fetch_weights()
    except (ImportError, WeightsError) as error:
        raise ArgumentError(f"no real weights: {error}. Install the extra examples, or pass --quick") from error
    model, chat = read_gguf(path)
    return model, document.prompts(chat), path.stem


def _tiny() -> tuple[Model, Prompts, str]:
    rng = np.random.default_rng(3)
    prefix = rng.integers(0, TINY.vocabulary, 15 * BLOCK_SIZE + 5).tolist()
    return Model.random(TINY), (prefix, [prefix + rng.integers(0, TINY.vocabulary, 18).tolist() for _ in range(5)]), "tiny"


def _rates(model: Model, sides: SideBySide, prefix: list[int], rounds: int) -> dict[str, float]:
    """Billions of operations a second of CPU time: a prefill's, and a large matrix product's."""
    pages = sides.cache.take(len(prefix))
    square = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    out = np.empty_like(square)

    def product() -> None:
        model.workers.run([lambda part=part: np.matmul(square, square[part].T, out=out[:, part]) for part in parts])

    def prefill() -> None:
        model.forward(np.array(prefix), 0, pages, sides.cache)

    parts = model.workers.split(len(square))
    rates: dict[str, list[float]] = {"prefill": [], "matmul": []}
    for _ in range(rounds):
        rates["matmul"].append(2e-9 * 2048**3 / _spent(product)[1])
        rates["prefill"].append(1e-9 * model.flops(len(prefix)) / _spent(prefill)[1])
    sides.cache.give_back(pages)
    medians = {f"{name}_gflop_a_cpu_second": statistics.median(found) for name, found in rates.items()}
    medians["prefill_share_of_matmul"] = medians["prefill_gflop_a_cpu_second"] / medians["matmul_gflop_a_cpu_second"]
    return medians


def _spent(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    return work(), max(time.process_time() - began, 1e-9)


def _save_prefix(sides: SideBySide, prefix: list[int]) -> list[Any]:
    """Computes the document, saves it in the place of what is known of it, and keeps a copy of its full blocks.

    Once for each prompt: the one before left a block that was computed again for its damage, beside another number of tokens,
    and by another order of a sum the last bit of a value may be another (with OpenBLAS's kernels for Haswell it is).
    """
    keys = sides.engine.block_keys(prefix)
    sides.engine.drop_blocks(keys)
    pages = sides.cache.take(len(prefix))
    sides.model.forward(np.array(prefix), 0, pages, sides.cache)
    sides.engine.save_blocks(keys, pages[: len(keys)]).wait()
    saved = [layer[:, pages[: len(keys)]] for layer in sides.cache.layers]
    sides.cache.give_back(pages)
    return saved


def _times(
    sides: SideBySide, prefix: list[int], prompt: list[int], number: int, rounds: int, pairs: list[float]
) -> dict[str, float]:
    """Medians over questions that differ in a token, so that no more than the document is cached; ``pairs`` gets the ratios of
    the CPU seconds of a request that is saved to one that is not."""
    ways: dict[str, list[tuple[Any, float]]] = {"cold": [], "saving": [], "hit": []}
    meter, shares = Meter(sides.engine), []
    saving = Server(sides.model, sides.cache, meter)  # type: ignore[arg-type]
    for turn in range(rounds):
        other = 20 + turn + rounds * number
        question = [*prefix, other, *prompt[len(prefix) :]]
        unknown = [other, *question[:0:-1]]  # no block of it is cached
        asked_of = {"cold": (sides.cold, question), "saving": (saving, unknown), "hit": (sides.warm, question)}
        own = _own(meter)
        for name in ("cold", "saving", "hit") if turn % 2 else ("saving", "cold", "hit"):
            server, asked = asked_of[name]
            ways[name].append(_spent(lambda server=server, asked=asked: server.generate(asked, 1)))
            if name == "saving":
                own = _own(meter) - own
        shares.append(own / ways["cold"][-1][1])
    found = {name: statistics.median(answer.first_token_s for answer, _ in answers) for name, answers in ways.items()}
    cpu = {name: statistics.median(spent for _, spent in answers) for name, answers in ways.items()}
    couples = list(zip(ways["saving"], ways["cold"], strict=True))
    pairs += (mine := [saved / spent for (_, saved), (_, spent) in couples])
    return {
        "cached": ways["hit"][0][0].cached_tokens,
        **{f"{name}_ms": 1e3 * seconds for name, seconds in found.items()},
        **{f"{name}_cpu_s": seconds for name, seconds in cpu.items()},
        "speedup": found["cold"] / found["hit"],
        "speedup_cpu": cpu["cold"] / cpu["hit"],
        "saving_ratio_cpu": statistics.median(mine),
        "saving_share": statistics.median(shares),
        "saving_cached": max(answer.cached_tokens for answer, _ in ways["saving"]),
        "saving_ratio": statistics.median(saved.first_token_s / cold.first_token_s for (saved, _), (cold, _) in couples),
    }


def _own(meter: Meter) -> float:
    """CPU seconds of kvortex so far."""
    return calls_of(meter) + threads_of("kvortex-")


def interval(samples: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Two of the samples, between which the median of what they were drawn from lies, with at least this confidence.

    The k-th smallest of n independent samples is above it with the chance that fewer than k of n tosses of a coin fall on one
    side (the sign test turned round: W. J. Conover, Practical Nonparametric Statistics, 3.2). Where they are too few for that,
    the smallest and the largest.
    """
    n, ordered = len(samples), sorted(samples)
    k, outside = 0, 2.0 * 0.5**n
    while k + 1 < (n + 1) // 2 and outside <= 1 - confidence:
        k += 1
        outside += 2.0 * math.comb(n, k) * 0.5**n
    k = max(0, k - 1) if outside > 1 - confidence else k
    return ordered[k], ordered[n - 1 - k]


def _wrong_bytes(sides: SideBySide, prefix: list[int], saved: list[Any]) -> int:
    """Bytes of the document's pages that come back as others."""
    keys = sides.engine.block_keys(prefix)
    pages = sides.cache.take(len(keys) * BLOCK_SIZE)
    for layer in sides.cache.layers:
        layer[:, pages] = 0
    arrived = sides.engine.load_blocks(keys, pages).wait()
    pairs = zip(sides.cache.layers, saved, strict=True)
    wrong = sum(int((layer[:, pages].view(np.uint8) != kept.view(np.uint8)).sum()) for layer, kept in pairs)
    sides.cache.give_back(pages)
    return wrong + int((~arrived).sum())


def _answers(sides: SideBySide, prompt: list[int], prefix: int, new_tokens: int) -> dict[str, int]:
    pair = sides.ask("", prompt, new_tokens)
    block = prefix // BLOCK_SIZE // 2
    _flip_bit(sides.engine, sides.engine.block_keys(prompt)[block])
    again = sides.warm.generate(prompt, new_tokens)
    same = {"same_tokens": pair.same_tokens, "same_bits": pair.same_bits}
    same["same_tokens_recomputed"] = again.tokens == pair.cold.tokens
    return {name: int(value) for name, value in same.items()} | {"recomputed": again.recomputed_blocks}


def _flip_bit(engine: kvortex.KVortexEngine, key: Any) -> None:
    """Damages a block in the pool, from inside the engine: nobody else could."""
    slots = engine._index.acquire(engine.scheme.stored(key[None]))
    engine._index.release(slots)
    engine._parts.arena.view(int(slots[0]))[12345] ^= np.uint8(4)


def draw(axes: Any, report: Report) -> None:
    """CPU time to the first token of each prompt, cold and with a hit: the clock's depends on who else computes."""
    at = np.arange(len(report.rows))
    ways = ((-0.2, "cold_cpu_s", "computed whole"), (0.2, "hit_cpu_s", "document loaded by kvortex"))
    for shift, column, label in ways:
        bars = axes.bar(at + shift, [row[column] for row in report.rows], 0.4, label=label)
        axes.bar_label(bars, fmt="%.2f")
    axes.set_xticks(at, [f"prompt {row['prompt']}\n{row['speedup_cpu']:.1f}x" for row in report.rows])
    axes.set_ylabel("CPU time to the first token, s")
    notes = report.notes
    axes.set_title(f"{notes['model']}, {notes['prefix_tokens']} tokens shared, {notes['threads']} CPUs, float32")
    axes.legend()

