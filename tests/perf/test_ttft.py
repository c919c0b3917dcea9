"""A model in JAX serves from kvortex on the host as it would on a GPU: right numbers, right bytes, and wrong ones are seen."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.errors import ArgumentError, ConfigError
from perf import __main__ as program
from perf import torch_llama, ttft
from perf.report import ROOT
from perf.shapes import SHAPES
from tests import naive_llama
from tests.perf.llama_weights import SMALL, fused, tensors_of

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.perf.jax_checks", str(tmp_path_factory.mktemp("ttft"))]
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # to compile
    done = subprocess.run(command, cwd=ROOT, env=os.environ | quick, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_jax
def test_scores_are_those_of_a_slow_and_obvious_model(checks: dict[str, Any]) -> None:
    found = checks["numbers"]
    assert found["from_naive"] < 1e-5
    assert found["behind_pages"] < 1e-5, "the end of a prompt behind its pages is the end of the prompt"
    assert found["spoilt"], "pages are read"
    assert found["other_pages"] == 0 and 0.99 < found["written_pages"] / found["layer_size"] <= 1  # half, of two
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96  # q, k, v; output; gate, up, down
    attention = sum(2 * 2 * 4 * 16 * (at + 1) for at in range(7))  # scores and values of each token that is seen
    assert found["flops"] == 2 * (2 * 7 * layer + attention) + 2 * 64 * 64


@needs_jax
def test_pages_that_moved_are_refused_and_wrong_bytes_are_counted(checks: dict[str, Any]) -> None:
    found = checks["places"]
    assert "moved the pages of layer 1" in found["moved"]
    assert found["differ"] == 2 and found["same"] == 0  # NaN and 1.0 in bfloat16: 0x7fc0 and 0x3f80


@needs_jax
def test_attention_falls_back_and_says_so(checks: dict[str, Any]) -> None:
    assert checks["attention"]["name"] == "xla"
    assert [why.split(":")[0] for why in checks["attention"]["refused"]] == ["cudnn", "pallas"]


@needs_jax
def test_the_measurement_is_whole(checks: dict[str, Any]) -> None:
    assert checks["whole"]["status"] == 0
    result = checks["whole"]["result"]
    options = "--tokens 96 --engine num_transfer_streams=2 --engine enable_numa=no --skip torch"
    assert result["command"] == f"python -m perf ttft --device host --quick {options}"
    assert result["notes"]["engine"] == {"KVORTEX_NUM_TRANSFER_STREAMS": "2", "KVORTEX_ENABLE_NUMA": "no"}
    assert "jax" in result["environment"]["packages"] and result["notes"]["attention"] == "xla"
    (row,) = result["rows"]
    assert set(ttft.COLUMNS) - {"torch_ms", "to_torch"} <= set(row) and row["tokens"] == 96
    assert row["wrong_bytes"] == 0 and row["same_bits"] == row["resident_same_bits"] == row["saving_same_bits"] == 1
    assert all(row[figure] > 0 for figure in ttft.BETTER) and row["beside_layers"] >= 0


@needs_jax
def test_wrong_blocks_are_seen(checks: dict[str, Any]) -> None:
    """From wrong pages, and into wrong ones; the measurement says so by its exit status too."""
    assert all(found["status"] == program.WRONG_BYTES and found["wrong_bytes"] > 10_000 for found in checks["wrong"].values())
    assert checks["wrong"]["load_blocks"]["same_bits"] == 0


@needs_jax
def test_what_was_measured_before_a_failure_is_kept(checks: dict[str, Any]) -> None:
    found = checks["fails"]
    assert found["tokens"] == [96] and "planted" in found["failed"]["64 tokens"] and found["status"] == program.FAILED


@needs_jax
def test_on_a_gpu_each_layer_is_waited_for(checks: dict[str, Any]) -> None:
    """One that does everything as late as it may; without the waits there is not yet in the pages what is computed with."""
    found = checks["gpu"]["waits"]
    assert 0 < found.pop("off_exact") < 0.5, "of a codec with loss"
    assert found == {"device": "cuda:0", "same_bits": 1, "saving_same_bits": 1, "wrong_bytes": 0}
    assert checks["gpu"]["does not"]["same_bits"] == 0 < checks["gpu"]["does not"]["wrong_bytes"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens": "4096,abc"}, "--tokens 4096,abc: give lengths"),
        ({"tokens": "100"}, "multiples of 16"),
        ({"tokens": "16"}, "from 32"),
        ({"tokens": "32784", "shape": "8b"}, "to 32768"),
        ({"tokens": "64,64"}, "each length once"),
        ({"skip": "disk,ram"}, "--skip ram"),
        ({"codecs": "raw,raw"}, "each once"),
        ({"codecs": "cachegen"}, "give some of raw, plane"),
        ({"disk": Path("/not/there")}, "is no folder"),
        ({"engine": ["route=strided"]}, "unknown option"),
        ({"engine": ["staging_buffers=many"]}, "staging_buffers"),
        ({"minutes": 0.0}, "more than 0"),
        ({"minutes": float("nan")}, "more than 0"),
    ],
)
def test_options_are_refused_before_anything_is_measured(given: dict[str, Any], said: str) -> None:
    with pytest.raises((ArgumentError, ConfigError), match=said):
        ttft.measure("host", quick=True, options=argparse.Namespace(**given))


def test_options_are_for_their_question_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["link", "--device", "host", "--tokens", "64"])
    assert "--tokens is for ttft alone" in capsys.readouterr().err


def test_what_torch_says_is_read_to_its_last_whole_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(stdout: bytes, code: int) -> dict[str, Any]:
        done = subprocess.CompletedProcess([], code, stdout)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
        return ttft._torch(ttft._plan("host", True, None))

    assert given(b"", -9) == {"not_compared": "it ended with -9"}
    assert given(b'noise\n{"seconds": {"96": 1}}\n{"seconds": {"96": 1, "256": 2}}\n', 1)["seconds"] == {"96": 1, "256": 2}


def test_without_torch_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["torch_llama", "--shape", "tiny", "--device", "host", "--tokens", "96"])
    assert torch_llama.main() == 0
    assert json.loads(capsys.readouterr().out)["not_compared"].startswith("torch cannot be imported")


def test_torch_computes_what_a_slow_and_obvious_model_does() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(7)
    tensors, tokens = tensors_of(SMALL, rng), rng.integers(0, SMALL.vocabulary, 48)
    right = naive_llama.logits(SMALL, tensors, tokens.tolist())[-1]

    def given(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: given(one) for name, one in part.items()}
        return [given(one) for one in part] if isinstance(part, list) else torch.from_numpy(np.array(part))

    model = torch_llama.TorchLlama(torch, SMALL, "cpu", given(fused(SMALL, tensors)))
    for attend in torch_llama.attentions(torch, "cpu").values():
        found = model.prefill(torch.from_numpy(tokens), attend).numpy()
        assert np.linalg.norm(found - right) < 1e-5 * np.linalg.norm(right)
    for said in torch_llama.measured(torch, model, [16, 32], 1):
        assert said["seconds"][16] > 0 and not said["refused"]
    assert set(said["seconds"]) == set(said["attention"]) == {16, 32}


def test_the_large_model_has_the_sizes_that_it_is_named_for() -> None:
    shape = SHAPES["8b"]
    each = shape.width * (shape.width + 2 * shape.kv_heads * shape.head_dim) + shape.width**2 + 3 * shape.width * shape.ffn
    assert 8.0e9 < shape.layers * each + 2 * shape.vocabulary * shape.width < 8.1e9
    assert 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * 16 == 2 << 20  # bytes of a block, bfloat16
