"""How soon does a model of the size of Llama-3-8B give its first token when its prompt is cached, on a GPU and without PyTorch?

JAX computes (``perf/jax_llama.py``), in bf16, on random weights and random tokens, over a paged cache with blocks of 16 tokens.
Seconds are the host's, from the prompt's tokens to the first new one (``perf/jax_serving.py``), medians after a warm-up:

- ``cold_ms``: the prompt computed whole, without kvortex;
- ``hit_ms``: all blocks but the last loaded from pinned RAM, layer by layer ahead of the last one's forward pass; ``speedup``
  is ``cold_ms`` to this;
- ``disk_ms``: likewise from the disk tier, by an engine that has just been made and has nothing in RAM;
- ``beside_cold_ms``, ``beside_hit_ms``: the same two while another prompt is prefilled without a pause; loaded as a whole here,
  and computed when it is there, so that what waits behind the other prefill is one pass and not each layer;
- ``resident_ms``: the last block alone, behind pages that never left VRAM: what a hit could not be faster than;
- ``saving_ratio``: a cold prompt with its blocks saved behind each layer against one without, the median of pairs by turns;
- ``torch_ms``: torch's prefill of the same sizes, by the fastest attention it has here, in a process before this one
  (``perf/torch_llama.py``).

``same_bits``: whether the scores of the first token behind every kind of hit are bit by bit those of ``resident_ms``.
``wrong_bytes``: bytes of pages that came back as others, and of scores that differ. Pages are filled with NaN before each hit.
With a codec that loses something (``--codecs``) ``same_bits`` says just that, ``wrong_bytes`` are of a few blocks against what
the codec's own calls make of them, and ``off_exact`` is how far scores are from the exact ones, relative: on random weights, so
it says nothing about quality (``perf prefix`` does).
``off_cold``: distance of these scores from those of the whole prompt, relative, which rounding in other sums makes.

``--quick``, and ``--device host``: a tiny model, which shows that it works. ``--help`` has the options.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kvortex
from examples.lm.pages import BLOCK_SIZE
from kvortex.errors import ArgumentError, told
from perf import foreign, jax_serving
from perf.jax_llama import ATTENTIONS, JaxLlama, choose_attention
from perf.jax_pages import JaxPages
from perf.jax_serving import Waits
from perf.report import ROOT, Report, progress
from perf.shapes import SHAPES
from perf.ttft_length import RAW, TIMEOUT_S, OneLength, Plan

KEYS = ("tokens", "codec")
BETTER = {"cold_ms": "lower", "hit_ms": "lower", "speedup": "higher"} | {
    "disk_ms": "lower",
    "disk_speedup": "higher",
    "beside_cold_ms": "lower",
    "beside_hit_ms": "lower",
    "beside_speedup": "higher",
    "resident_ms": "lower",
    "saving_ratio": "lower",
}
COLUMNS = (*KEYS, *BETTER, "torch_ms", "to_torch", "off_cold", "same_bits", "wrong_bytes")
SIZES = {"8b": (4096, 32768, 1024, 16384, 8192), "tiny": (256, 96)}  # those that matter most come first
_CODECS = (RAW, "plane", "int8", "k6v4", "k4v4", "k4v3")
OTHER = {"8b": 8192, "tiny": 96}  # tokens of the other prompt


def add_options(parser: Any) -> None:
    """Of ``python -m perf ttft`` alone; None where they were not given."""
    parser.add_argument("--shape", choices=sorted(SHAPES), help="the model: 8b on a GPU, tiny elsewhere and with --quick")
    parser.add_argument("--tokens", help="lengths of prompts, multiples of 16, in the order to measure them: 4096,32768")
    parser.add_argument("--attention", choices=ATTENTIONS, help="of whole prompts: cudnn on a GPU; the next if it fails")
    parser.add_argument("--disk", type=Path, help="an existing folder for the disk tier's files, which are removed")
    parser.add_argument("--minutes", type=float, help="after which no other length is begun: 5")
    parser.add_argument("--codecs", help=f"of {','.join(_CODECS)}: how hits are kept, a row for each")
    parser.add_argument("--tables", type=Path, help="of kvortex calibrate --tables, for codecs; else of the model's own pages")
    parser.add_argument("--engine", action="append", help="NAME=VALUE: an option of the engines, as gpu_pool_size_bytes=1GiB")
    parser.add_argument("--skip", help="parts that are left out, of disk,beside,torch")


def measure(
    device_name: str, *, quick: bool, options: argparse.Namespace | None = None
) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, a row for each length, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    plan = _plan(device.name, quick, options)
    began = time.monotonic()
    torch = {} if "torch" in plan.skip else _torch(plan)
    jax = foreign.jax(device.name)
    shape = SHAPES[plan.shape]
    progress(f"JAX {jax.__version__}: pages and weights of {plan.shape}, attention")
    pages = JaxPages(jax, shape, 2 * max(plan.sizes) // BLOCK_SIZE, device.name)  # before anything else
    attention = choose_attention(jax, shape, plan.attention)
    model = JaxLlama(jax, shape, attention)
    rows: list[dict[str, Any]] = []
    left_out, failed = [], {}
    with contextlib.closing(Waits(device, jax)) as waits:
        for size in plan.sizes:
            if rows and time.monotonic() - began > plan.seconds:
                left_out.append(size)
                continue
            one = OneLength(jax, device, plan, model, pages, waits, size)
            try:
                for row in one.rows(torch.get("seconds", {}).get(str(size))):
                    rows.append(row)
                    shown = (f"{name} {row[name]:.4g}" for name in (*BETTER, "to_torch") if name in row)
                    progress(f"{size} tokens, {row['codec']}: {', '.join(shown)}; {row['wrong_bytes']} bytes wrong")
            except Exception as error:  # of JAX, whose memory may not do for a long prompt: the others still count
                if not rows:
                    raise
                failed[f"{size} tokens"] = told(error)
    notes: dict[str, Any] = {"model": plan.shape, "attention": attention.name, "block_size": BLOCK_SIZE}
    notes |= {"attention_refused": list(attention.refused), "left_out": left_out, "skipped": sorted(plan.skip)}
    notes |= {"failed": failed, "torch": torch, "other_tokens": plan.other, "xla_flags": os.environ.get("XLA_FLAGS", "")}
    notes |= {"pages": pages.count, "pages_lie_evenly": pages.even, "engine": plan.engine}
    notes |= {"layers_in_flight": jax_serving.AHEAD, "layers_waited_by": waits.by, "minutes": (time.monotonic() - began) / 60}
    return device.name, sorted(rows, key=lambda row: int(row["tokens"])), notes


def _plan(device: str, quick: bool, options: argparse.Namespace | None) -> Plan:
    given = {name: value for name, value in vars(options or argparse.Namespace()).items() if value is not None}
    on_gpu = device.startswith("cuda")
    shape = given.get("shape") or ("8b" if on_gpu and not quick else "tiny")
    try:
        sizes = tuple(int(size) for size in given["tokens"].split(",")) if "tokens" in given else SIZES[shape]
    except ValueError:
        sizes = ()
    if not sizes or any(not 2 * BLOCK_SIZE <= size <= SHAPES[shape].context or size % BLOCK_SIZE for size in sizes):
        raise ArgumentError(
            f"--tokens {given['tokens']}: give lengths from {2 * BLOCK_SIZE} to {SHAPES[shape].context} that are multiples of "
            f"{BLOCK_SIZE}, as 4096,32768"
        )
    if len(set(sizes)) != len(sizes):
        raise ArgumentError(f"--tokens {given['tokens']}: give each length once")
    skip = frozenset(given.get("skip", "").split(",")) - {""}
    if unknown := skip - {"disk", "beside", "torch"}:
        raise ArgumentError(f"--skip {','.join(sorted(unknown))}: only disk, beside and torch can be left out")
    codecs = tuple(given.get("codecs", RAW).split(","))
    if set(codecs) - set(_CODECS) or len(set(codecs)) != len(codecs):
        raise ArgumentError(f"--codecs {given['codecs']}: give some of {', '.join(_CODECS)}, each once")
    if codecs != (RAW,) and "codec" not in {field.name for field in dataclasses.fields(kvortex.KVortexConfig)}:
        raise ArgumentError(f"--codecs {given['codecs']}: the engines of this kvortex have no codecs; leave it out")
    disk = given.get("disk")
    if disk is not None and not disk.is_dir():
        raise ArgumentError(f"--disk {disk}: is no folder")
    minutes = given.get("minutes", 5.0)
    if not minutes > 0:
        raise ArgumentError(f"--minutes {minutes}: give more than 0")
    tables = {"codec_tables": str(given["tables"])} if "tables" in given else {}
    pairs = (text.partition("=") for text in given.get("engine", ()))
    engine = {f"KVORTEX_{name.strip().upper()}": value for name, _, value in pairs}
    kvortex.KVortexConfig.from_env(engine)  # or says what is wrong with it
    attention = given.get("attention") or ("cudnn" if on_gpu else "xla")
    return Plan(device, shape, sizes, attention, OTHER[shape], disk, 60 * minutes, skip, codecs, tables, engine, quick)


def _torch(plan: Plan) -> dict[str, Any]:
    """What :mod:`perf.torch_llama` says, or why it says nothing."""
    progress("torch: prefill of the same sizes")
    sizes = ",".join(map(str, sorted(plan.sizes)))
    command = [sys.executable, "-m", "perf.torch_llama", "--shape", plan.shape, "--device", plan.device, "--tokens", sizes]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=TIMEOUT_S, check=False)
        said, end = done.stdout, f"it ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        said, end = error.stdout or b"", f"it had not ended after {TIMEOUT_S} s"
    lines = [line for line in said.splitlines() if line.startswith(b"{")]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {"not_compared": end}
    return found


def draw(axes: Any, report: Report) -> None:
    """Time to the first token by length, of each way."""
    ways = {"cold_ms": "computed whole", "disk_ms": "loaded from disk", "hit_ms": "loaded from RAM"}
    ways["resident_ms"] = "never left VRAM"
    colours = dict(zip(ways, ("#27608f", "#d0792a", "#5c8a3a", "#888888"), strict=True))
    rows = [row for row in report.rows if row["codec"] == report.rows[0]["codec"]]
    sizes = [row["tokens"] for row in rows]
    for column, label in ways.items():
        if all(column in row for row in rows):
            axes.plot(sizes, [row[column] for row in rows], "o-", color=colours[column], label=label)
    for codec in {row["codec"] for row in report.rows} - {rows[0]["codec"]}:
        points = [(row["tokens"], row["hit_ms"]) for row in report.rows if row["codec"] == codec]
        axes.plot(*zip(*points, strict=True), "s--", color=colours["hit_ms"], label=f"loaded from RAM, {codec}")
    for row in rows:
        place = {"xytext": (0, -12), "textcoords": "offset points"}
        axes.annotate(f"{row['speedup']:.1f}x", (row["tokens"], row["hit_ms"]), fontsize=8, **place)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel("tokens of the prompt, all but the last 16 cached")
    axes.set_ylabel("time to first token, ms")
    axes.set_title(f"A prompt whose beginning is cached, model {report.notes['model']} in JAX, {report.device}", fontsize=10)
    axes.legend(fontsize=8)
