"""Coded loads in groups of layers on a GPU: what a stream finds behind each wait, when it finds it, and damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvortex.codecs import make_codec
from kvortex.codecs.base import HEADER
from kvortex.devices import driver as cu
from kvortex.devices import open_device
from kvortex.errors import CorruptBlocksError
from kvortex.transfer.layer_load import LayerLoad
from tests.engine.coded import CODED, slot_of, slots_of
from tests.engine.test_order import Gate
from tests.pages import keys_of
from tests.transfer.profiles import shape
from tests.transfer.test_coded import SHAPE, Cache

COUNT = 300
Bytes = npt.NDArray[np.uint8]


class Behind:
    """What a stream of the caller finds in the pages of a layer behind the wait for it."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.gate = cache, Gate(cache.cache.device)
        self.copies = [cache.cache.device.allocate(tensor.buffer.nbytes) for tensor in cache.cache.tensors]

    def follow(self, ticket: Any) -> None:
        for layer, (copy, tensor) in enumerate(zip(self.copies, self.cache.cache.tensors, strict=True)):
            ticket.wait_layer(layer, self.gate.stream)
            self.gate.copy(copy, tensor.buffer)

    def read(self, pages: Any) -> Bytes:
        """(n, raw_bytes): as :meth:`Cache.read`."""
        self.gate.synchronize()
        parts = [copy.read().reshape(2, 2 * self.cache.blocks, -1)[:, pages].swapaxes(0, 1) for copy in self.copies]
        return np.stack(parts, 1).reshape(len(pages), -1)


@pytest.mark.gpu
@pytest.mark.parametrize("staging", [1 << 20, 64 << 20])
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("name", CODED)
def test_a_layer_is_there_when_its_wait_is_over(
    name: str, busy: bool, staging: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Loads one behind another, in other pages each; every 60th block is a first one."""
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    cache = Cache(open_device("cuda"), tmp_path, COUNT)
    first, back = np.arange(COUNT) % 60 == 5, np.empty_like(cache.records)
    codec = make_codec(name, SHAPE, cache.tables)
    coded = np.zeros((COUNT, codec.slot_bytes), np.uint8)
    assert (codec.encode_into(cache.records, coded) > 0).all() and codec.decode_into(coded, back).all()
    back[first] = cache.records[first]
    cache.fill(cache.records)
    options = {"codec": name, "gpu_pool_size_bytes": staging, "beside_compute": busy, "cpu_pool_size_bytes": 600 << 17}
    with cache.engine(**options) as engine:
        keys, behind = keys_of(*range(COUNT)), Behind(cache)
        assert engine.save_blocks(keys, cache.order[:COUNT], first=first).wait().all()
        for turn in range(3):
            some = np.random.default_rng(turn).permutation(COUNT)[: COUNT if turn else 40]
            pages = cache.order[COUNT:][np.random.default_rng(9 + turn).permutation(COUNT)[: len(some)]]
            cache.fill(cache.records)  # noise where is loaded to
            ticket = engine.load_blocks(keys[some], pages, layerwise=True, first=first[some], stream=behind.gate.stream)
            behind.follow(ticket)
            assert (behind.read(pages) == back[some]).all(), turn
            assert ticket.wait().all() and ticket.error is None
            assert isinstance(ticket._transfer.completion, LayerLoad)
            assert (cache.read(pages) == back[some]).all(), turn
        behind.gate.finish()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plane", "k4v4"])
def test_damage_is_seen_whichever_group_it_is_in(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bits that flip anywhere in a record, and lengths that lie; the other blocks come whole."""
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    cache, rng = Cache(open_device("cuda"), tmp_path, COUNT), np.random.default_rng(8)
    cache.fill(cache.records)
    with cache.engine(codec=name, gpu_pool_size_bytes=4 << 20) as engine:
        keys, pages = keys_of(*range(COUNT)), cache.order[COUNT:]
        for _ in range(4):
            assert engine.save_blocks(keys, cache.order[:COUNT], first=False).wait().all()
            hurt = rng.permutation(COUNT)[:80]
            for slot in slots_of(engine, keys[hurt]):
                there = slot_of(engine, slot)
                header = there[:64].view(HEADER)
                used = int(header["used_bytes"][0])
                kind = int(rng.integers(4))
                if kind == 0:
                    header["used_bytes"] = int(rng.integers(0, 1 << int(rng.integers(1, 40))))
                else:
                    most = (64, 64 + 4 * 1024, used)[kind - 1]
                    where = int(rng.integers(min(most, used)))
                    there[where] ^= 1 << int(rng.integers(8))
            damaged = np.isin(np.arange(COUNT), hurt)
            ticket = engine.load_blocks(keys, pages, layerwise=True, first=False)
            for layer in range(SHAPE.layers):
                ticket.wait_layer(layer)
            assert (ticket.wait() == ~damaged).all()
            assert isinstance(ticket.error, CorruptBlocksError) and ticket.error.blocks == len(hurt)
            if name == "plane":
                assert (cache.read(pages[~damaged]) == cache.records[~damaged]).all()
            assert (engine.check_blocks(keys, first=False) == ~damaged).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plane", "int8"])
def test_the_first_layers_come_early(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the GPU's own clock."""
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    device = open_device("cuda")
    cache = Cache(device, tmp_path, 6 * COUNT)
    cache.fill(cache.records)
    with cache.engine(codec=name, cpu_pool_size_bytes=6 * COUNT << 17) as engine:
        keys, stream = keys_of(*range(6 * COUNT)), Gate(device).stream
        assert engine.save_blocks(keys, cache.order[: 6 * COUNT], first=False).wait().all()
        took: list[float] = []
        for _ in range(2):
            with cu.current(device.context) as driver:  # type: ignore[attr-defined]
                events = [cu.check(driver.cuEventCreate(0), "cuEventCreate") for _ in range(2 + SHAPE.layers)]
                cu.check(driver.cuEventRecord(events[0], stream), "cuEventRecord")
            ticket = engine.load_blocks(keys, cache.order[6 * COUNT :], layerwise=True, stream=stream, first=False)
            for layer, event in enumerate(events[1:]):
                ticket.wait_layer(layer, stream) if layer < SHAPE.layers else ticket.add_to(stream)
                with cu.current(device.context) as driver:  # type: ignore[attr-defined]
                    cu.check(driver.cuEventRecord(event, stream), "cuEventRecord")
            assert ticket.wait().all()
            with cu.current(device.context) as driver:  # type: ignore[attr-defined]
                cu.check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize")
                elapsed = (driver.cuEventElapsedTime(events[0], event) for event in events[1:])
                took = [cu.check(each, "cuEventElapsedTime") for each in elapsed]
    assert took == sorted(took) and took[0] < 0.8 * took[-1], took
