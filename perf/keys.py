"""How long does it take to name the blocks of a long prompt?

The keys of 131,072 tokens, by both schemes, against hashlib (and cbor2, for vLLM's) block after block as vLLM has it; and
the step that puts vLLM's hashes into a namespace. Both take turns, their bytes are compared, and times are of the calling
thread, which does all of the work, on its CPU. Tokens come as a NumPy array and as a Python list, whose items must be looked at
one by one before anything else; the other way always gets the list that it wants. ``plain`` is without the CPU's SHA
instructions. ``spin_ratio`` is how fast a thread counts in Python meanwhile, against alone, and ``other_spin_ratio`` the same
beside the other way, both without the time for which the thread could have run and had no CPU: what else runs on the
machine takes none of the GIL. All on the host: ``--device`` makes no difference.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from kvortex.errors import ArgumentError
from kvortex.keys import KvortexKeys, Namespace, VllmKeys, _sha_ni, adopt, load_compiled
from perf.gil import Spinners
from perf.report import Report, progress

BLOCK_SIZE = 16
VOCABULARY = 128_256  # of Llama 3
SEED = "0"
SPAN_S, SHORTEST_S = 0.2, 0.5e-3  # of counting, and of what is timed
KEYS = ("what", "given")
BETTER = {"ms": "lower", "times_faster": "higher", "plain_ms": "lower", "plain_times_faster": "higher", "spin_ratio": "higher"}
COLUMNS = (*KEYS, "other", "other_ms", *BETTER, "other_spin_ratio", "wrong_bytes")
Call = Callable[[], Any]


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The host, a row for each scheme and form of tokens, and what the rows have in common."""
    tokens, rounds, spans = (2048, 2, 1) if quick else (131_072, 25, 12)
    load_compiled()
    rows = []
    for (what, given), (ours, other, how) in _questions(tokens).items():
        progress(f"{what}, from {given}")
        wrong = _wrong_bytes(ours(), other())
        figures = _times(ours, other, rounds) | _spins(ours, other, spans)
        rows.append({"what": what, "given": given, "other": how} | figures | {"wrong_bytes": wrong})
    notes = {"tokens": tokens, "block_size": BLOCK_SIZE, "blocks": tokens // BLOCK_SIZE, "rounds": rounds, "spans": spans}
    notes |= {"unit": "ms of the thread's CPU time, medians", "sha_instructions": _sha_ni.available()}
    return "host", rows, notes | {"cbor2": importlib.metadata.version("cbor2")}


def _questions(count: int) -> dict[tuple[str, str], tuple[Call, Call, str]]:
    """What is named, from what, by us, by the other way, and how that one goes."""
    try:
        from tests.naive_keys import sha256_cbor, vllm_hashes
    except ImportError as error:
        raise ArgumentError(f"keys needs cbor2, of the test extra, to compare with: {error}") from None
    namespace = Namespace(model="m", block_size=BLOCK_SIZE)
    vllm, kvortex = VllmKeys(namespace, seed=SEED), KvortexKeys(namespace)
    array = np.random.default_rng(0).integers(0, VOCABULARY, count)
    numbers, first = array.tolist(), sha256_cbor(SEED)
    hashes = vllm.block_keys(array)
    names, parent, last = list(map(bytes, hashes)), hashes[-2], numbers[-BLOCK_SIZE:]
    chain, cbor = "hashlib", "hashlib + cbor2"

    def cbor_all() -> list[bytes]:
        return vllm_hashes(numbers, BLOCK_SIZE, first)

    def chain_all() -> list[bytes]:
        return _chain(namespace.seed, numbers)

    return {
        ("vllm", "array"): (lambda: vllm.block_keys(array), cbor_all, cbor),
        ("vllm", "list"): (lambda: vllm.block_keys(numbers), cbor_all, cbor),
        ("kvortex", "array"): (lambda: kvortex.block_keys(array), chain_all, chain),
        ("kvortex", "list"): (lambda: kvortex.block_keys(numbers), chain_all, chain),
        ("adopt", "array"): (lambda: adopt(namespace, hashes), lambda: _adopted(namespace.adopting_seed, names), chain),
        ("vllm, one more block", "list"): (
            lambda: vllm.block_keys(last, parent),
            lambda: vllm_hashes(last, BLOCK_SIZE, parent.tobytes()),
            cbor,
        ),
    }


def _chain(digest: bytes, numbers: list[int]) -> list[bytes]:
    raw, step, found = np.array(numbers, "<u4").tobytes(), 4 * BLOCK_SIZE, []
    for at in range(0, len(raw), step):
        digest = hashlib.sha256(digest + raw[at : at + step]).digest()
        found.append(digest)
    return found


def _adopted(seed: bytes, names: list[bytes]) -> list[bytes]:
    return [hashlib.sha256(seed + name).digest() for name in names]


def _wrong_bytes(keys: np.ndarray, expected: list[bytes]) -> int:
    other = np.frombuffer(b"".join(expected), np.uint8).reshape(-1, 32)
    return int((keys != other).sum()) if keys.shape == other.shape else max(keys.size, other.size)


def _times(ours: Call, other: Call, rounds: int) -> dict[str, float]:
    found: dict[str, list[float]] = {"other_ms": [], "ms": [], "plain_ms": []}
    for _ in range(rounds):
        found["other_ms"].append(_timed(other))
        found["ms"].append(_timed(ours))
        with mock.patch.object(_sha_ni, "available", lambda: False):
            found["plain_ms"].append(_timed(ours))
    median = {name: statistics.median(times) * 1e3 for name, times in found.items()}
    faster = {"times_faster": median["other_ms"] / median["ms"], "plain_times_faster": median["other_ms"] / median["plain_ms"]}
    return median | faster


def _timed(call: Call) -> float:
    """Seconds of the thread on its CPU; of a short call, the mean of many."""
    began, calls, took = time.thread_time(), 0, 0.0
    while took < SHORTEST_S:
        call()
        calls, took = calls + 1, time.thread_time() - began
    return took / calls


def _spins(ours: Call, other: Call, spans: int) -> dict[str, float]:
    """How fast one thread counts beside each way, against alone."""
    ways = {"alone": lambda: time.sleep(SPAN_S), "spin_ratio": lambda: _again(ours), "other_spin_ratio": lambda: _again(other)}
    seen = {name: np.zeros(2) for name in ways}
    with Spinners(1) as spinner:
        for _ in range(spans):
            for name, work in ways.items():
                seen[name] += _counted(spinner, work)
    rates = {name: count / seconds for name, (count, seconds) in seen.items()}
    return {name: float(rates[name] / rates["alone"]) for name in ("spin_ratio", "other_spin_ratio")}


def _again(call: Call) -> None:
    ends = time.perf_counter() + SPAN_S
    while time.perf_counter() < ends:
        call()


def _counted(spinner: Spinners, work: Callable[[], None]) -> npt.NDArray[np.float64]:
    """Counts while ``work`` is done, and the seconds for which the counting thread had a CPU or waited for the GIL."""

    def now() -> npt.NDArray[np.float64]:
        return np.array([spinner.total(), time.perf_counter(), spinner.delay(), spinner.computed()])

    before = now()
    work()
    count, wall, delay, computed = now() - before
    # The kernel adds a delay when it has ended, which may be more than this span saw of it.
    return np.array([count, max(wall - delay, computed)])


def draw(axes: Any, report: Report) -> None:
    """How many times faster than the other way."""
    rows = report.rows
    at = np.arange(len(rows))
    axes.barh(at + 0.2, [row["times_faster"] for row in rows], 0.38, label="with SHA instructions", color="#27608f")
    axes.barh(at - 0.2, [row["plain_times_faster"] for row in rows], 0.38, label="without", color="#d0792a")
    axes.set_yticks(at, [f"{row['what']}, from {row['given']}\nagainst {row['other']}" for row in rows], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.6)
    axes.axvline(10, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel(f"times faster, {report.notes['tokens']} tokens, blocks of {report.notes['block_size']}")
    axes.set_title("Naming blocks, on the host", fontsize=10)
    axes.invert_yaxis()
    axes.legend()
