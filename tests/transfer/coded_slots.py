"""Engines of a model with several layers whose slots tests fill themselves: records of mixed lengths, slots in any order."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.codecs import Codec, RecordShape, calibrate
from kvortex.codecs.lossy import LossyCodec
from kvortex.devices import Device
from kvortex.devices.cuda import CudaDevice
from kvortex.engine import KVortexEngine
from kvortex.errors import CodecError
from kvortex.transfer.executor import Completion, Direction
from tests.engine.coded import Coded, kv, slot_of, slot_of_page
from tests.pages import Bytes, PagedCache, Tensor

LAYERS, PAGES, HEADS, DIM = 6, 16, 2, 64
KINDS = ("K and V in a tensor", "K and V apart", "HND")


def deep(folder: Path, kind: str = KINDS[0], device: Device | None = None, pages: int = PAGES) -> Coded:
    """Pages of six layers, filled with noise."""
    d = CudaDevice() if device is None else device
    nhd, hnd = (16, HEADS, DIM), (HEADS, 16, DIM)
    cache = {
        KINDS[0]: lambda: PagedCache(d, [Tensor(d, (2, pages, *nhd)) for _ in range(LAYERS)], 1),
        KINDS[1]: lambda: PagedCache(d, [Tensor(d, (pages, *nhd)) for _ in range(2 * LAYERS)], 0),
        KINDS[2]: lambda: PagedCache(d, [Tensor(d, (2, pages, *hnd)) for _ in range(LAYERS)], 1),
    }[kind]()
    shape = RecordShape(LAYERS, HEADS, DIM, order="HND" if kind == "HND" else "NHD")
    records = kv(np.random.default_rng(4), shape, pages)
    tables = calibrate(records, shape)
    tables.save(folder / "deep.tables", shape)
    cache.randomize()
    return Coded(cache, shape, tables, folder / "deep.tables", records)


def mixed(coded: Coded, codec: Codec, seed: int) -> Bytes:
    """Records as the tables know them, some with wilder numbers in some layers, so that their lengths and where their layers
    lie differ; tiles that are kept as they are among them. All fit into slots."""
    rng, made = np.random.default_rng(seed), coded.records.copy()
    planes = made.view(np.uint16).reshape(len(made), coded.shape.planes, -1)
    for at in range(0, len(made), 2):
        plane, count = int(rng.integers(coded.shape.planes)), int(rng.integers(20, 500))
        where = rng.integers(0, planes.shape[2], count)
        before = planes[at, plane, where].copy()
        planes[at, plane, where] = rng.integers(0x3000, 0x4400, count).astype(np.uint16)
        try:
            fits = len(codec.encode(made[at])) <= codec.slot_bytes
        except CodecError:
            fits = False
        if not fits:
            planes[at, plane, where] = before
    return made


@dataclass
class Filled:
    """What lies in an engine's slots, and what a load of it makes.

    ``blocks``, ``slots``, ``parts`` are a call's arguments; ``records`` (n, raw_bytes) what pages ``blocks`` then hold.
    """

    coded: Coded
    engine: KVortexEngine
    blocks: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    parts: npt.NDArray[np.int64] | None
    pages: npt.NDArray[np.int64]
    records: Bytes

    @classmethod
    def make(cls, coded: Coded, engine: KVortexEngine, count: int, seed: int, firsts: int = 0) -> Filled:
        """``count`` blocks, of which a codec with loss keeps ``firsts`` in parts."""
        codec, rng = engine.codec, np.random.default_rng(seed)
        assert codec is not None
        records, pages = mixed(coded, codec, seed)[:count], rng.permutation(len(coded.records))[:count]
        lossy = isinstance(codec, LossyCodec)
        each = [range(codec.parts) if isinstance(codec, LossyCodec) and at < firsts else (-1,) for at in range(count)]
        rows = [(at, part) for at, mine in enumerate(each) for part in mine]
        order = rng.permutation(len(rows))
        slots = np.sort(rng.permutation(len(rows) + 6))[: len(rows)][order]
        of, parts = np.array(rows, np.int64)[rng.permutation(len(rows))].T
        for slot, at, part in zip(slots.tolist(), of.tolist(), parts.tolist(), strict=True):
            there = slot_of(engine, slot)
            there[:] = 0
            there[: codec.slot_bytes] = np.frombuffer(slot_of_page(codec, records[at], part), np.uint8)
        wanted = records.copy()
        for at in range(count):
            if lossy and at >= firsts:
                wanted[at] = coded.expected(codec.name, records[at])
        return cls(coded, engine, pages[of], slots, parts if lossy else None, pages, wanted)

    def load(self, stream: Any, layerwise: bool = True) -> Completion:
        """Started."""
        executor = self.engine._executor
        completion = executor.prepare_blocks(Direction.LOAD, self.blocks, self.slots, stream, layerwise, self.parts)
        completion.start()
        return completion

    def right(self, gpu: Any, layers: int, at: int) -> bool:
        """Whether a block's first layers are in its page, on a GPU made of RAM."""
        layout, page, record = self.coded.cache.layout, int(self.pages[at]), self.records[at]
        return all(
            (gpu.array(base + page * stride, nbytes, ctypes.c_uint8) == record[offset : offset + nbytes]).all()
            for base, stride, offset, nbytes in layout.fragments.tolist()
            if offset < layout.layer_offsets[layers]
        )

    def spoil(self) -> None:
        """Noise into all pages."""
        self.coded.cache.randomize()
