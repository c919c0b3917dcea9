"""How short do codecs make real KV, and what is lost? On the K and V of two small models, by the CPU alone.

Tables are learnt from blocks of the first half of the text, the first block left out; ``ratio`` and errors are of the second
half, headers and fill included. ``ratio_1536``: of a sequence of 96 blocks whose first one is exact, as every codec keeps it.
``error_k`` and ``error_v``: relative L2 error, mean over layers. ``largest``: the largest error, as a part of the root mean
square of the layer's K or V that it is in. ``attention``: relative L2 error of softmax(QK')V over all tokens, mean over heads;
real queries are not in the sample, so they are drawn at random and scaled until scores scatter by 2. ``encode`` and
``decode``: GB/s of original bytes, one thread's CPU time. ``wrong_bytes``: of what has to come back exactly: a sequence's first
block, and everything from exact codecs. ``lmcache 0.5.6``: the scheme that LMCache ships, as tests/naive_codecs.py restates it,
on the first 256 tokens. ``cachegen 0`` to ``2`` are its levels of quality.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.codecs import CODECS, Codec, RecordShape, Tables, calibrate, make_codec
from kvortex.codecs.cachegen import LEVELS
from kvortex.errors import ArgumentError
from perf.report import ROOT, Report, progress

SAMPLE = ROOT.parent / "shared" / "data" / "kv" / "kv_sample_bf16.npz"
MODELS = {"smollm2": RecordShape(30, 3, 64), "qwen": RecordShape(24, 2, 64)}
SEQUENCE = 96  # blocks of 16 tokens: 1,536 tokens
QUERIES, SCATTER = 32, 2.0
KEYS = ("model", "codec")
CODINGS: dict[str, dict[str, Any]] = {name: {} for name in CODECS if name != "cachegen"} | {
    f"cachegen {level}": {"level": level} for level in range(len(LEVELS))
}
_LOSSES = {"error_k": "lower", "error_v": "lower", "attention": "lower"}
BETTER = {"ratio": "higher", **_LOSSES, "encode": "higher", "decode": "higher"}
COLUMNS = (*KEYS, "ratio", "ratio_1536", "error_k", "error_v", "largest", "attention", "encode", "decode", "wrong_bytes")
Floats = npt.NDArray[np.float32]


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The host, a row for each model and codec, and what the rows have in common."""
    rows = []
    for model, shape in list(MODELS.items())[-1 if quick else 0 :]:
        values = sample(SAMPLE, model)
        for name in CODINGS:
            progress(f"{model}, {name}")
            rows.append({"model": model, "codec": name} | _row(name, shape, values, 1 if quick else 9))
        rows.append({"model": model, "codec": "lmcache 0.5.6"} | _shipped(values))
    return "host", rows, {"queries": QUERIES, "scatter": SCATTER, "blocks_of_a_sequence": SEQUENCE, "sample": SAMPLE.name}


def codec_for(name: str, shape: RecordShape, tables: Tables) -> Codec:
    """By its name in ``CODINGS``."""
    return make_codec(name.split()[0], shape, tables, **CODINGS[name])


def sample(path: Path, model: str) -> npt.NDArray[np.uint16]:
    """(layers, 2, tokens, heads, head_dim) bf16 patterns."""
    if not path.exists():
        raise ArgumentError(f"the sample of real KV, {path.name}, is not in shared/data/kv beside the checkout")
    with np.load(path) as data:
        return np.stack([data[f"{model}_K"], data[f"{model}_V"]], 1)


def records_of(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """(n, raw_bytes): a record for every 16 tokens."""
    layers, _, tokens, heads, dim = values.shape
    pages = values.reshape(layers, 2, tokens // 16, 16, heads, dim).transpose(2, 0, 1, 3, 4, 5)
    return np.ascontiguousarray(pages).reshape(tokens // 16, -1).view(np.uint8)


def values_of(records: npt.NDArray[np.uint8], like: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """The reverse."""
    layers, _, tokens, heads, dim = like.shape
    pages = records.view(np.uint16).reshape(tokens // 16, layers, 2, 16, heads, dim)
    return pages.transpose(1, 2, 0, 3, 4, 5).reshape(like.shape)


def floats(patterns: npt.NDArray[np.uint16]) -> Floats:
    """Of bf16 patterns."""
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _row(name: str, shape: RecordShape, values: npt.NDArray[np.uint16], rounds: int) -> dict[str, Any]:
    records = records_of(values)
    half = len(records) // 2
    codec = codec_for(name, shape, calibrate(records[1:half], shape))
    first = np.arange(len(records)) == 0
    coded, back = np.zeros((len(records), -(-codec.worst_bytes // 4) * 4), np.uint8), np.empty_like(records)
    sizes = codec.encode_into(records, coded, first)
    if not codec.decode_into(coded, back).all():
        raise ArgumentError(f"{name} does not read what it wrote")
    must = slice(None) if codec.exact else slice(0, 1)
    ratio, mean = records[half:].size / sizes[half:].sum(), float(sizes[half:].mean())
    whole = SEQUENCE * shape.raw_bytes / (sizes[0] + (SEQUENCE - 1) * mean)
    rates = _rates(codec, records[1:], rounds)
    missed = _errors(floats(values), floats(values_of(back, values)), 16 * half)
    wrong = {"wrong_bytes": int((back != records)[must].sum())}
    return {"ratio": float(ratio), "ratio_1536": float(whole)} | missed | rates | wrong


def _rates(codec: Codec, records: npt.NDArray[np.uint8], rounds: int) -> dict[str, float]:
    coded, back = np.zeros((len(records), codec.worst_bytes + 3 & ~3), np.uint8), np.empty_like(records)
    calls: dict[str, Callable[[], Any]] = {
        "encode": lambda: codec.encode_into(records, coded), "decode": lambda: codec.decode_into(coded, back)
    }
    return {name: records.size / min(_seconds(call) for _ in range(rounds)) / 1e9 for name, call in calls.items()}


def _seconds(call: Callable[[], Any]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def _shipped(values: npt.NDArray[np.uint16]) -> dict[str, Any]:
    from tests.naive_codecs import Shipped

    part = floats(values[:, :, :256])
    shipped = Shipped(part.reshape(*part.shape[:3], -1))
    ratio = 2 * part.size / sum(shipped.nbytes().values())
    nothing = {"encode": 0.0, "decode": 0.0, "wrong_bytes": 0}
    return {"ratio": ratio, "ratio_1536": ratio} | _errors(part, shipped.decoded().reshape(part.shape), 0) | nothing


def _errors(values: Floats, back: Floats, begin: int) -> dict[str, float]:
    """From token ``begin`` on; of attention over all tokens."""
    x, y = values[:, :, begin:], back[:, :, begin:]
    norm = np.sqrt(np.square(x, dtype=np.float64).sum((2, 3, 4)))
    missed = np.sqrt(np.square(x - y, dtype=np.float64).sum((2, 3, 4)))
    of_k, of_v = (missed / norm).mean(0)
    size = norm / np.sqrt(x[0, 0].size)
    largest = (np.abs(x - y).max((2, 3, 4)) / size).max()
    return {"error_k": float(of_k), "error_v": float(of_v), "largest": float(largest), "attention": _attention(values, back)}


def _attention(values: Floats, back: Floats) -> float:
    rng, found = np.random.default_rng(0), []
    for exact, other in zip(values, back, strict=True):
        for head in range(exact.shape[2]):
            keys = exact[0, :, head]
            queries = rng.normal(size=(QUERIES, keys.shape[1])).astype(np.float32)
            scores = queries @ keys.T
            queries *= SCATTER / scores.std(1, keepdims=True)
            wanted, seen = (_attended(queries, part[0, :, head], part[1, :, head]) for part in (exact, other))
            found.append(np.linalg.norm(wanted - seen) / np.linalg.norm(wanted))
    return float(np.mean(found))


def _attended(queries: Floats, keys: Floats, values: Floats) -> Floats:
    scores = queries @ keys.T
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True) @ values)


def draw(axes: Any, report: Report) -> None:
    """What attention loses, by ratio: a line for each model."""
    for model, colour in zip(MODELS, ("#27608f", "#d0792a"), strict=True):
        rows = [row for row in report.rows if row["model"] == model and row["attention"] > 0]
        ours = [row for row in rows if row["codec"] in CODINGS]
        ours.sort(key=lambda row: float(row["ratio"]))
        axes.plot([row["ratio"] for row in ours], [row["attention"] for row in ours], "o-", color=colour, label=model)
        for row in rows:
            axes.annotate(row["codec"], (row["ratio"], row["attention"]), fontsize=7, xytext=(4, 4), textcoords="offset points")
            if row not in ours:
                axes.plot(row["ratio"], row["attention"], "x", color=colour)
    exact = {row["codec"]: row["ratio"] for row in report.rows if row["attention"] == 0}
    for name, ratio in exact.items():
        axes.axvline(ratio, color="black", linewidth=0.6, linestyle=":")
        where = {"xycoords": ("data", "axes fraction"), "rotation": 90, "va": "top", "ha": "right"}
        axes.annotate(f"{name}, exact", (ratio, 1), fontsize=7, **where)
    axes.set_yscale("log")
    axes.set_xlabel("ratio to bf16, headers included")
    axes.set_ylabel("relative error of attention's output")
    axes.set_title("Codecs on real KV", fontsize=10)
    axes.legend()
