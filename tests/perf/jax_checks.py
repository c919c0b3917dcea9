"""What ``test_ttft.py`` asks, answered in a process of its own, since JAX has threads and other tests fork: one JSON object.

``python -m tests.perf.jax_checks FOLDER`` in the top folder.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvortex
from examples.lm.pages import BLOCK_SIZE
from kvortex.devices import HostDevice
from kvortex.errors import LayoutError
from perf import __main__ as program
from perf import foreign, jax_serving, ttft
from perf.jax_llama import Attention, JaxLlama, choose_attention
from perf.jax_pages import JaxPages
from perf.ttft_length import OneLength
from tests import naive_llama
from tests.fake_gpu import fake_gpu
from tests.late_gpu import LateGpu
from tests.perf.llama_weights import SMALL, fused, tensors_of

TOKENS = 3 * BLOCK_SIZE


def run(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and result of a quick measurement."""
    given = ["ttft", "--quick", "--device", "host", "--out", str(folder), "--skip", "torch", *options]
    status = program.main(given)
    path = folder / "ttft-host.json"
    return status, json.loads(path.read_text()) if path.exists() else {}


def distance(mine: Any, right: Any) -> float:
    return float(np.linalg.norm(np.asarray(mine) - right) / np.linalg.norm(right))


def numbers(jax: Any) -> dict[str, Any]:
    """How far the model is from a slow and obvious one; and that a prompt's end behind pages is the prompt's end."""
    rng = np.random.default_rng(7)
    tensors = tensors_of(SMALL, rng)
    tokens = rng.integers(0, SMALL.vocabulary, TOKENS, np.int32)
    right = naive_llama.logits(SMALL, tensors, tokens.tolist())[-1]
    weights = jax.device_put(fused(SMALL, tensors))
    model = JaxLlama(jax, SMALL, Attention("xla"), weights, "float32")
    pages = JaxPages(jax, SMALL, 2 * TOKENS // BLOCK_SIZE, "host", "float32")
    table, waits = rng.permutation(pages.count).astype(np.int32)[: TOKENS // BLOCK_SIZE], jax_serving.Waits(HostDevice())
    whole = jax_serving.cold(model, pages, waits, tokens, table).logits
    held = [np.asarray(layer + 0) for layer in pages.layers]
    behind = jax_serving.cold(model, pages, waits, tokens[-BLOCK_SIZE:], table).logits
    pages.spoil(table[:1])
    spoilt = jax_serving.cold(model, pages, waits, tokens[-BLOCK_SIZE:], table).logits
    found: dict[str, Any] = {"from_naive": distance(whole, right), "behind_pages": distance(behind, whole)}
    found["spoilt"] = not np.isfinite(spoilt).any()
    others = np.setdiff1d(np.arange(pages.count), table)
    found["other_pages"] = int(sum(np.count_nonzero(layer[others]) for layer in held))
    found["flops"] = model.flops(7)
    return found | {"written_pages": int(sum(np.count_nonzero(layer[table]) for layer in held)), "layer_size": held[0].size}


def places(jax: Any) -> dict[str, Any]:
    """Pages that have moved are refused; pages that differ are counted by the byte."""
    pages = JaxPages(jax, SMALL, 4, "host")
    pages.spoil(np.array([0, 1], np.int32))
    pages.layers[1] = pages.layers[1].at[0, 0, 0, 0, 0].set(1.0)  # elsewhere, since the old one is still there
    try:
        pages.check()
        moved = ""
    except LayoutError as error:
        moved = str(error)
    one, two = (np.array([at], np.int32) for at in (0, 1))
    return {"moved": moved, "differ": pages.wrong_bytes(one, two), "same": pages.wrong_bytes(one, one)}


def with_wrong(folder: Path, call: str) -> dict[str, Any]:
    """A measurement whose engine saves each block from the page of its neighbour, or loads the first one into all pages.

    (A neighbour's block in a page would change no score: keys know their positions, and all that is before a token is seen.)
    """
    right = getattr(kvortex.KVortexEngine, call)

    def wrong(self: Any, keys: Any, pages: Any, **named: Any) -> Any:
        if call == "save_blocks":
            return right(self, keys, np.roll(pages, 1), **named)
        return right(self, np.repeat(keys[:1], len(keys), 0), pages, **named)

    setattr(kvortex.KVortexEngine, call, wrong)
    try:
        status, result = run(folder, "--tokens", "96", "--skip", "torch,disk,beside")
    finally:
        setattr(kvortex.KVortexEngine, call, right)
    return {"status": status, **{name: result["rows"][0][name] for name in ("same_bits", "wrong_bytes")}}


def one_that_fails(folder: Path) -> dict[str, Any]:
    """A measurement in which the second length cannot be computed."""

    def no_memory(one: Any) -> float:
        if one._size == 64:
            raise MemoryError("planted")
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneLength, "_compile", no_memory)
        status, result = run(folder, "--tokens", "96,64", "--skip", "torch,disk,beside")
    return {"status": status, "failed": result["notes"]["failed"], "tokens": [row["tokens"] for row in result["rows"]]}


class Gpu(LateGpu):
    """Whose streams are waited for one by one."""

    def __init__(self) -> None:
        super().__init__(seed=1)
        self.answers["cuStreamSynchronize"] = lambda stream: self._now(self._until, int(stream))

    def _until(self, stream: int) -> None:
        while not self._idle(stream):
            pass


def on_a_gpu(jax: Any, *, waits: bool) -> dict[str, Any]:
    """A measurement on a GPU that does its work late, and whose memory JAX has its pages in; with waits for layers or not."""
    with pytest.MonkeyPatch.context() as patch, fake_gpu(patch, Gpu()) as gpu:
        made = JaxPages.__init__

        def known(self: Any, *arguments: Any, **named: Any) -> None:
            made(self, *arguments, **named)
            gpu.registered |= {address: layer.nbytes for address, layer in zip(self._addresses, self.layers, strict=True)}

        patch.setattr(JaxPages, "__init__", known)
        patch.setattr(foreign, "jax", lambda device: jax)
        # JAX computes on the host meanwhile, in threads of its own: it is done before this GPU goes on, in whatever order.
        patch.setattr(jax_serving.Waits, "number", lambda _, array: functools.partial(int, jax.block_until_ready(array)))
        if not waits:
            patch.setattr(jax_serving.Waits, "layer", lambda *_: None)
        codecs = "raw,plane,k4v4" if waits else "raw"
        options = argparse.Namespace(tokens="96", skip="torch,disk", attention="xla", codecs=codecs)
        device, rows, _ = ttft.measure("cuda:0", quick=True, options=options)
    assert [row["codec"] for row in rows] == codecs.split(",")
    said = {name: [row[name] for row in rows] for name in ("same_bits", "saving_same_bits", "wrong_bytes")}
    assert not waits or said["same_bits"].pop() == "with loss"
    found = {name: max(each) if name == "wrong_bytes" else min(each) for name, each in said.items()}
    return {"device": device, **found} | {name: row[name] for row in rows for name in ("off_exact",) if name in row}


def main() -> None:
    warnings.simplefilter("error")
    folder = Path(sys.argv[1])
    jax = foreign.jax("host")
    asked = choose_attention(jax, SMALL, "cudnn", rows=32)
    found: dict[str, Any] = {"numbers": numbers(jax), "places": places(jax)}
    found["attention"] = {"name": asked.name, "refused": asked.refused}
    engine = ("--engine", "num_transfer_streams=2", "--engine", "enable_numa=no")
    status, result = run(folder / "whole", "--tokens", "96", *engine)
    found["whole"] = {"status": status, "result": result}
    found["wrong"] = {call: with_wrong(folder / call, call) for call in ("save_blocks", "load_blocks")}
    found["fails"] = one_that_fails(folder / "fails")
    found["gpu"] = {"waits": on_a_gpu(jax, waits=True), "does not": on_a_gpu(jax, waits=False)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
