"""Predictions on coded prefixes: the measurement with a model of one formula, and the real model where it is at hand."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.lm.download import MEMBER
from kvortex.kernels.cache import cache_folder
from perf import __main__ as program
from perf import llama, prefix
from tests.codecs.sample import values_of


class Formula:
    """Predicts by the mean of V of what it has seen, weighed by K; two layers of one head."""

    layers, kv_heads, dim = 2, 1, 64

    def __init__(self, path: Any) -> None:
        rng = np.random.default_rng(1)
        self.k = llama.bf16(rng.normal(size=(50, 1, 64)).astype(np.float32) + rng.normal(size=64).astype(np.float32) * 5)
        self.v = llama.bf16(rng.normal(size=(50, 1, 64)).astype(np.float32))
        self.out = rng.normal(size=(64, 50)).astype(np.float32)

    def close(self) -> None:
        self.closed = True

    def tokens(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64) % 50

    def forward(self, ids: np.ndarray, past: Any = None, *, scores: bool = True) -> Any:
        kept = [(self.k[ids], self.v[ids] * (layer + 1)) for layer in range(2)]
        if not scores:
            return None, kept
        seen = [[np.concatenate((old, new))[:, 0] for old, new in zip(past[at], kept[at], strict=True)] for at in range(2)]
        weights = [np.exp((self.k[ids, 0] @ k.T) / 64) for k, _ in seen]
        mixed = sum(w / w.sum(-1, keepdims=True) @ v for w, (_, v) in zip(weights, seen, strict=True))
        return 3 * mixed @ self.out, kept


def test_what_is_lost_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "Llama", Formula)
    monkeypatch.setattr(prefix, "weights", lambda: None)
    monkeypatch.setattr(prefix, "PREFIX", 512)
    monkeypatch.setattr(prefix, "LEARNT", 256)
    assert program.main(["prefix", "--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "prefix-host.json").read_text())
    assert {row["model"] for row in result["rows"]} == {"smollm2"} and len(result["notes"]["base_perplexity"]["smollm2"]) == 1
    rows = {row["codec"]: row for row in result["rows"]}
    assert set(prefix.COLUMNS) <= set(rows["int8"])
    for name in ("raw", "plane"):
        assert rows[name]["kl"] == rows[name]["ppl"] == 0 and rows[name]["top1"] == 1
    kl = [rows[name]["kl"] for name in ("int8", "k6v4", "k4v4", "k4v3")]
    assert 0 < 10 * kl[0] < min(kl[1:]) and max(kl) < 0.5 and all(row["wrong_bytes"] == 0 for row in rows.values())


def test_a_second_model_and_all_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "Llama", Formula)
    monkeypatch.setattr(prefix, "weights", lambda: None)
    monkeypatch.setattr(prefix, "PREFIX", 256)
    monkeypatch.setattr(prefix, "LEARNT", 256)
    monkeypatch.setattr(prefix, "WINDOWS", (prefix.WINDOWS[0], prefix.WINDOWS[-1]))
    (tmp_path / "qwen.gguf").write_bytes(b"weights")
    assert program.main(["prefix", "--qwen", str(tmp_path / "qwen.gguf"), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "prefix-host.json").read_text())
    assert result["notes"]["qwen"] == f"sha256 {hashlib.sha256(b'weights').hexdigest()}" and str(tmp_path) not in str(result)
    models = [row["model"] for row in result["rows"]]
    assert models == sorted(models, reverse=True) and set(models) == {"smollm2", "qwen"}
    rows = [row for row in result["rows"] if row["codec"] == "k4v3"]
    assert all(0 < row["kl"] < row["kl_worst"] and row["ppl_se"] > 0 for row in rows), "of two windows"


def test_files_that_are_no_such_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("gguf", reason="needs the extra examples")
    monkeypatch.setattr(prefix, "weights", lambda: tmp_path / "none.gguf")
    run = ["prefix", "--quick", "--out", str(tmp_path), "--qwen"]
    assert program.main([*run, str(tmp_path / "missing.gguf")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    (tmp_path / "noise.gguf").write_bytes(b"noise" * 1000)
    assert program.main([*run, str(tmp_path / "noise.gguf")]) == 2
    assert "noise.gguf is no model that can be read here" in capsys.readouterr().err


def test_weights_that_are_not_those_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / Path(MEMBER).name).write_bytes(b"something else")
    assert program.main(["prefix", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert "is not the file" in capsys.readouterr().err


@pytest.mark.slow
def test_the_model_gives_the_sample_back() -> None:
    """K and V of the sample's own tokens, to the rounding of sums in another order; where the weights were fetched already."""
    path = cache_folder() / "weights" / Path(MEMBER).name
    if not path.exists() or not all(importlib.util.find_spec(name) for name in ("gguf", "tokenizers")):
        pytest.skip("the weights, or the extra that reads them, are not here: python -m perf prefix fetches the former")
    values = values_of("smollm2")
    from tests.codecs.sample import PATH

    with np.load(PATH) as sample:
        ids = sample["smollm2_ids"].astype(np.int64)
    model = llama.Llama(path)
    assert (model.tokens(prefix._manual()[100_000:130_000])[: len(ids)] == ids).all()
    _, cache = model.forward(ids, scores=False)
    mine = prefix._patterns(cache)
    assert (mine[0] == values[0]).mean() > 0.999
    from perf.codecs import floats

    keys, wanted = (floats(both[:, 0]).reshape(len(both), -1) for both in (mine, values))
    assert (np.linalg.norm(keys - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max() < 0.004
    whole, _ = model.forward(ids)
    behind, kept = model.forward(ids[80:], [(k[:80], v[:80]) for k, v in cache])
    assert np.linalg.norm(behind - whole[80:]) < 0.01 * np.linalg.norm(whole[80:]), "behind a prefix that was handed in"
    assert kept[0][0].shape == cache[0][0][80:].shape
    model.close()
