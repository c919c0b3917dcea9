"""Engines whose pools hold coded records, of small models' made-up KV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvortex.codecs import Codec, RecordShape, Tables, calibrate, make_codec
from kvortex.codecs.base import HEADER, PART
from kvortex.codecs.lossy import LossyCodec
from kvortex.devices import Device, HostDevice
from kvortex.engine import KVortexEngine
from tests.pages import Bytes, PagedCache, Tensor

LOSSY = ["int8", "k6v4", "k4v4", "k4v3"]
CODED = ["plane", *LOSSY]
GPUS = ["fake", pytest.param("cuda", marks=pytest.mark.gpu)]
WHERE = ["host", *GPUS]
# Codecs, and where their engines are. Of those with loss two are enough on a GPU made of RAM: with a rotation and without one.
_FAKE = ["plane", "int8", "k4v3"]


def _each(codecs: list[str], where: tuple[str, ...] = ("host", "fake", "cuda")) -> list[Any]:
    on_gpu = [pytest.param(codec, "cuda", marks=pytest.mark.gpu) for codec in codecs]
    found = {"host": [(codec, "host") for codec in codecs], "cuda": on_gpu}
    found["fake"] = [(codec, "fake") for codec in codecs if codec in _FAKE]
    return [param for name in where for param in found[name]]


EACH, EACH_LOSSY, EACH_GPU = _each(CODED), _each(LOSSY), _each(CODED, ("fake", "cuda"))
BLOCKS = 12
T, H, D, L = 16, 2, 64, 3
NHD, HND = RecordShape(L, H, D), RecordShape(L, H, D, order="HND")


def caches(device: Device | None = None) -> dict[str, tuple[PagedCache, RecordShape]]:
    """Pages of each kind that records may have, and what these mean."""
    d, b = HostDevice() if device is None else device, BLOCKS
    return {
        "K and V in a tensor": (PagedCache(d, [Tensor(d, (2, b, T, H, D)) for _ in range(L)], 1), NHD),
        "blocks first": (PagedCache(d, [Tensor(d, (b, 2, T, H, D)) for _ in range(L)], 0), NHD),
        "K and V apart": (PagedCache(d, [Tensor(d, (b, T, H, D)) for _ in range(2 * L)], 0), NHD),
        "heads joined": (PagedCache(d, [Tensor(d, (2, b, T, H * D)) for _ in range(L)], 1), NHD),
        "all layers": (PagedCache(d, [Tensor(d, (b, L, 2, T, H, D))], 0, 1), NHD),
        "padded": (PagedCache(d, [Tensor(d, (2, b, T, H, D), pad={2: 36, 1: 4096}, shift=2) for _ in range(L)], 1), NHD),
        "HND": (PagedCache(d, [Tensor(d, (2, b, H, T, D)) for _ in range(L)], 1), HND),
        "HND in memory": (PagedCache(d, [Tensor(d, (2, b, T, H, D), order=(0, 1, 3, 2, 4)) for _ in range(L)], 1), HND),
    }


def kv(rng: np.random.Generator, shape: RecordShape, count: int = BLOCKS) -> Bytes:
    """(n, raw_bytes): records of numbers as a model has them, each channel with a scale and an offset of its own."""
    size = shape.planes, 1, shape.channels
    scale, offset = np.exp(rng.normal(size=size) / 2), rng.normal(size=size) * 2
    numbers = rng.normal(size=(count, shape.planes, shape.tokens, shape.channels)) * scale + offset
    bits = numbers.astype(np.float32).view(np.uint32) >> np.uint32(16)
    return bits.astype(np.uint16).reshape(count, -1).view(np.uint8)


@dataclass
class Coded:
    """An engine's pages, and what goes with them.

    ``records`` are (n, raw_bytes), what its pages hold now.
    """

    cache: PagedCache
    shape: RecordShape
    tables: Tables
    path: Path
    records: Bytes

    @classmethod
    def make(cls, folder: Path, kind: str = "K and V in a tensor", seed: int = 5, device: Device | None = None) -> Coded:
        cache, shape = caches(device)[kind]
        records = kv(np.random.default_rng(seed), shape)
        tables = calibrate(records, shape)
        tables.save(folder / f"{kind} {seed}.tables", shape)
        cache.randomize()
        made = cls(cache, shape, tables, folder / f"{kind} {seed}.tables", records)
        for at, record in enumerate(records):
            made.write(at, record)
        return made

    def _pages(self, block: int) -> list[tuple[int, int]]:
        """Address and bytes of each fragment of a page."""
        return [(base + block * stride, nbytes) for base, stride, _, nbytes in self.cache.layout.fragments.tolist()]

    def _buffer(self, address: int) -> Any:
        """The tensor's memory that an address lies in."""
        buffers = [tensor.buffer for tensor in self.cache.tensors]
        return next(buffer for buffer in buffers if buffer.address <= address < buffer.address + buffer.nbytes)

    def write(self, block: int, record: Bytes) -> None:
        at = 0
        for address, nbytes in self._pages(block):
            buffer = self._buffer(address)
            buffer.write(record[at : at + nbytes], address - buffer.address)
            at += nbytes

    def read(self, block: int) -> Bytes:
        found = []
        for address, nbytes in self._pages(block):
            buffer = self._buffer(address)
            found.append(buffer.read(address - buffer.address, nbytes))
        return np.concatenate(found)

    def engine(self, codec: str, slots: int = 64, **options: Any) -> KVortexEngine:
        small = {"gpu_pool_size_bytes": 600_000}  # so that a few blocks take several chunks
        return self.cache.engine(slots, codec=codec, codec_tables=str(self.path), **small | options)

    def expected(self, codec: str, record: Bytes, first: bool = False) -> Bytes:
        """What comes back of a record, by the codec's own calls."""
        if first:
            return record
        made = make_codec(codec, self.shape, self.tables)
        return np.frombuffer(made.decode(made.encode(record)), np.uint8)


def slot_of_page(codec: Codec, record: Bytes, part: int = -1) -> bytes:
    """All that a slot holds of a page, or of a part of it as it is, by the codec's own calls or by its description."""
    made = codec.encode(record) if part < 0 else b""
    if part >= 0:
        assert isinstance(codec, LossyCodec)
        header, own = codec.header.copy(), record[part * codec.part_bytes :][: codec.part_bytes]
        header["stored"], header["part"], header["used_bytes"] = PART, part, HEADER.itemsize + len(own)
        made = header.tobytes() + own.tobytes()
    return made.ljust(codec.slot_bytes, b"\0")


def parts_of(engine: KVortexEngine) -> int:
    """Slots that the first block of a sequence takes."""
    return engine.codec.parts if isinstance(engine.codec, LossyCodec) else 1


def slot_of(engine: KVortexEngine, slot: int) -> Bytes:
    """The bytes of a slot, themselves."""
    arena = engine._parts.arena
    return _array(arena.address + slot * arena.slot_bytes, arena.slot_bytes)


def slots_of(engine: KVortexEngine, keys: npt.NDArray[np.uint8]) -> list[int]:
    """Where blocks lie that are no first ones."""
    slots = engine._index.acquire(keys)
    engine._index.release(slots)
    return slots.tolist()


def _array(address: int, nbytes: int) -> Bytes:
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
