"""The real KV of two small models as records, where it is at hand, and records that no model would make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvortex.codecs import RecordShape, Tables
from kvortex.codecs.tables import BINS, FINE

PATH = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "kv" / "kv_sample_bf16.npz"
SHAPES = {"smollm2": RecordShape(30, 3, 64), "qwen": RecordShape(24, 2, 64)}
MODELS = tuple(SHAPES)
Bytes = npt.NDArray[np.uint8]


def values_of(model: str) -> npt.NDArray[np.uint16]:
    """(layers, 2, tokens, heads, head_dim) bf16 patterns; skips the test where the sample is not there."""
    if not PATH.exists():
        pytest.skip(f"the sample of real KV is not at {PATH.name} beside the checkout")
    with np.load(PATH) as sample:
        return np.stack([sample[f"{model}_K"], sample[f"{model}_V"]], 1)


def records_of(values: npt.NDArray[np.uint16], order: str = "NHD") -> Bytes:
    """(n, raw_bytes): a record for every 16 tokens."""
    layers, _, tokens, heads, dim = values.shape
    pages = values.reshape(layers, 2, tokens // 16, 16, heads, dim).transpose(2, 0, 1, 3, 4, 5)
    if order == "HND":
        pages = pages.swapaxes(3, 4)
    return np.ascontiguousarray(pages).reshape(tokens // 16, -1).view(np.uint8)


def tables_of(shape: RecordShape, rng: np.random.Generator, base: int | None = None) -> Tables:
    """Any tables: the same base everywhere, or any base anywhere; of spreads about 1.4, and numbers that are normal."""
    size = shape.planes, shape.channels
    made = rng.integers(0, 256, size, np.uint8) if base is None else np.full(size, base, np.uint8)
    mean = (rng.normal(size=size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    away = (np.arange(BINS) - BINS // 2) / FINE
    counts = np.rint(1e6 * np.exp(-(away**2) / 2)).astype(np.uint32)
    return Tables(made, mean, rng.integers(129, 132, size).astype(np.uint8), np.stack((counts, counts)))
