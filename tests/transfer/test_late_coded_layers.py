"""Coded loads in groups of layers on a GPU made of RAM that works late: who waits for a layer has it, and all before it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.codecs import make_codec
from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.executor import Completion, poll
from kvortex.transfer.layer_load import LayerLoad
from tests.engine.coded import Coded
from tests.engine.test_interrupts import Trap
from tests.fake_gpu import fake_gpu
from tests.late_gpu import LateGpu
from tests.pages import keys_of
from tests.transfer.coded_slots import KINDS, Filled, deep
from tests.transfer.profiles import shape

STREAM, COUNT = 0x77000, 13
# Staging buffers of both directions, records of each, and options.
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "several": (8, 2, {}),
    "one buffer": (2, 1, {"num_transfer_streams": 1, "staging_buffers": 1}),
    "beside compute": (8, 3, {"beside_compute": True}),
    "no digests": (8, 2, {"digests": False}),
}


CASES = [*(("plane", how) for how in SHAPES), ("k4v3", "several"), ("int8", "beside compute")]


@pytest.mark.parametrize(("codec", "how"), CASES)
def test_who_waits_for_a_layer_has_it(codec: str, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    buffers, each, options = SHAPES[how]
    for seed, kind in enumerate(KINDS):
        with fake_gpu(monkeypatch, LateGpu(seed)) as gpu:
            if seed % 2:
                monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", -1)  # issued by the lanes' threads
            coded = deep(tmp_path, kind, CudaDevice())
            room = -(-make_codec(codec, coded.shape, coded.tables).slot_bytes // 4096) * 4096
            with coded.engine(codec, gpu_pool_size_bytes=buffers * each * room, slots=64, **options) as engine:
                filled = Filled.make(coded, engine, COUNT, seed, firsts=2)
                filled.spoil()
                load = filled.load(STREAM)
                assert isinstance(load, LayerLoad)
                right = watched(gpu, filled, load)
                assert poll(load.query, time.monotonic() + 10) and load.error is None and load.unfit is None
                gpu.finish()
                assert (load.digests is None) == (how == "no digests")
                assert right == [True] * len(right) and len(right) == coded.cache.layout.num_layers


def watched(gpu: LateGpu, filled: Filled, load: Completion) -> list[bool]:
    """Gets, layer by layer behind the wait for it, whether all blocks have it and those before. Each on a stream of its own."""
    right: list[bool] = []

    def look(layers: int) -> None:
        right.append(all(filled.right(gpu, layers, at) for at in range(len(filled.records))))

    for layer in range(filled.coded.cache.layout.num_layers):
        load.add_to(STREAM + 1 + layer, 5.0, layer)
        gpu.enqueue(STREAM + 1 + layer, look, layer + 1)
    return right


def test_behind_a_mark_all_is_one_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    for seed, codec in enumerate(["plane", "k4v3"]):
        with fake_gpu(monkeypatch, LateGpu(seed)) as gpu:
            coded = deep(tmp_path, device=CudaDevice())
            with coded.engine(codec, slots=64) as engine:
                filled = Filled.make(coded, engine, COUNT, seed, firsts=1)
                filled.spoil()
                load = filled.load(engine._executor.mark(STREAM))
                assert not isinstance(load, LayerLoad)
                right = watched(gpu, filled, load)
                assert poll(load.query, time.monotonic() + 10) and load.error is None and load.digests is not None
                gpu.finish()
                assert right == [True] * 6


def test_the_first_group_does_not_wait_for_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some order that streams and events allow has the first layers there, and the last ones not yet."""
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch, LateGpu(3, patience=3)) as gpu:
        coded = deep(tmp_path, device=CudaDevice())
        with coded.engine("plane", slots=64) as engine:
            filled = Filled.make(coded, engine, 12, 1)
            filled.spoil()
            load: Any = filled.load(STREAM)
            assert load._rest._behind is load._first, "nor is it ever issued behind it"
            found: list[bool] = []
            load.add_to(STREAM, 5.0, 0)
            gpu.enqueue(STREAM, lambda: found.append(any(filled.right(gpu, 6, at) for at in range(12))))
            assert poll(load.query, time.monotonic() + 10) and load.error is None
            gpu.finish()
            assert found == [False]


def test_an_interrupt_at_any_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What had been issued goes on, and what it holds comes back."""
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch, LateGpu(1)) as gpu:
        coded = Coded.make(tmp_path, device=CudaDevice())
        with coded.engine("plane", slots=16) as engine:
            keys, blocks = keys_of(*range(5)), np.arange(5)
            assert engine.save_blocks(keys, blocks).wait().all()
            for turn in itertools.count(1, 11):
                trap = Trap(turn)
                trap.run(lambda: engine.load_blocks(keys, 5 + blocks, layerwise=True))
                assert poll(lambda: not engine.get_stats().pinned_blocks, time.monotonic() + 5), trap.sprung
                gpu.finish()
                assert not gpu.left
                if not trap.sprung:
                    break
            engine._index.check()
            ticket = engine.load_blocks(keys, 6 + blocks, layerwise=True)
            assert ticket.wait().all() and isinstance(ticket._transfer.completion, LayerLoad) and turn > 300
            assert all((coded.read(6 + at) == coded.records[at]).all() for at in range(5))
