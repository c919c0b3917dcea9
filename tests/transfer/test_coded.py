"""Plans of coded records, and long transfers of them on a GPU beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvortex import KVortexConfig, KVortexEngine
from kvortex.codecs import RecordShape, calibrate, make_codec
from kvortex.codecs.base import HEADER
from kvortex.codecs.lossy import LossyCodec
from kvortex.devices import Device, open_device
from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.coded.coders import used_lengths
from kvortex.transfer.coded.plans import DeviceCoder, plan_coded
from kvortex.transfer.executor import Direction
from kvortex.transfer.plan import COPY_BYTES, CTAS, DEVICE_SIDE, HOST_PITCH, HOST_SIDE, KERNEL, LINES, PITCH, Pool
from tests.engine.coded import CODED, Coded, kv, slot_of, slots_of
from tests.fake_gpu import fake_gpu
from tests.pages import PagedCache, Tensor, keys_of

HOST = 1 << 40


def test_lengths_are_what_headers_say_and_lead_nowhere() -> None:
    memory = np.full((6, 4096), 0xEE, np.uint8)
    headers = memory[:, : HEADER.itemsize].view(HEADER)[:, 0]
    headers["used_bytes"] = [100, 64, 0, 3000, 5000, 1 << 63]
    pool = Pool(memory.ctypes.data, 4096, 6)
    assert used_lengths(pool, np.array([0, 1, 2, 3, 4, 5]), 3200).tolist() == [100, 64, 64, 3000, 3200, 3200]
    assert used_lengths(pool, np.array([3, 0]), 3200).tolist() == [3000, 100]


def test_copies_are_as_long_as_the_longest_of_neighbours() -> None:
    pool, room = Pool(HOST, 8192, 4), 6000
    slots, used = np.array([1, 2, 3, 4, 5, 9]), np.array([64, 5000, 700, 80, 600, 5999])
    plan = plan_coded(np.arange(6), slots, used, pool, room, np.array([0, 5]))
    wanted = np.zeros((4, 6), np.int64)
    wanted[:, DEVICE_SIDE] = [0, 3 * room, 0, 0]
    wanted[:, HOST_SIDE] = HOST + 8192 * np.array([1, 4, 9, 0])
    wanted[:, COPY_BYTES], wanted[:, LINES] = [5120, 1024, 6000, 0], [3, 2, 1, 0]  # a border of memory between slots 3 and 4
    wanted[:, PITCH], wanted[:, HOST_PITCH] = room, 8192
    assert (plan.copies == wanted[:3]).all() and plan.nbytes == 3 * 5120 + 2 * 1024 + 6000
    whole = plan_coded(np.arange(6), slots, np.full(6, 8192), pool, 8192, np.array([0]))
    assert whole.copies[:, COPY_BYTES].tolist() == [3 * 8192, 2 * 8192, 8192] and (whole.copies[:, LINES] == 1).all()


def plans(engine: KVortexEngine) -> tuple[DeviceCoder, dict[int, str]]:
    """What plans an engine's transfers, and the names of its kernels by handle."""
    coder = engine._executor._coder  # type: ignore[attr-defined]
    return coder, {handle: name for name, handle in coder._kernels.items()}


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("codec", CODED)
def test_no_launch_that_is_not_needed(
    codec: str, digests: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = {
        Direction.SAVE: ["plane_encode" if codec == "plane" else "lossy_encode"],
        Direction.LOAD: [("plane_decode" if codec == "plane" else "lossy_decode") + "_digest" * digests],
    }
    with fake_gpu(monkeypatch):
        coded = Coded.make(tmp_path, device=CudaDevice())
        with coded.engine(codec, digests=digests) as engine:
            assert engine.save_blocks(keys_of(*range(9)), range(9), first=False).wait().all()
            coder, names = plans(engine)
            if codec == "plane":  # a counter, and a cell for each tile
                assert coder.work_bytes == 4 * (1 + coder.codec.tiles)
            for direction, launches in wanted.items():
                for busy in (False, True):
                    plan = coder.plan(direction, np.arange(9), np.arange(9)[::-1].copy(), busy)
                    assert [names[handle] for handle in plan.launches[:, KERNEL]] == launches * len(plan.chunks)
                    most = coder.most_ctas[direction is Direction.LOAD]
                    assert (plan.launches[:, CTAS] <= most).all() and len(plan.chunks) > 1


@pytest.mark.parametrize("codec", ["int8", "k6v4"])
def test_parts_move_what_they_keep(codec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To a slot all of it, zeros too; from there no zeros, whatever a header says."""
    with fake_gpu(monkeypatch):
        coded = Coded.make(tmp_path, device=CudaDevice())
        with coded.engine(codec, gpu_pool_size_bytes=8 << 20) as engine:
            made, (coder, _) = engine.codec, plans(engine)
            assert isinstance(made, LossyCodec)
            parts = np.array([-1, *range(made.parts)])
            slots, blocks = 3 * np.arange(len(parts))[::-1], np.array([5, *[2] * made.parts])
            last = 64 + made.shape.raw_bytes - (made.parts - 1) * made.part_bytes
            assert 64 < last < made.slot_bytes - 512
            for direction, ends in ((Direction.SAVE, made.slot_bytes), (Direction.LOAD, -(-last // 512) * 512)):
                plan = coder.plan(direction, blocks, slots, True, parts)
                assert plan.copies[:, COPY_BYTES].tolist() == [ends, *[made.slot_bytes] * made.parts]
                assert plan.ids.reshape(-1, 2).tolist() == np.stack((blocks, parts), 1)[::-1].tolist()
                assert plan.order.tolist() == list(range(len(parts)))[::-1]


SHAPE = RecordShape(4, 4, 128)  # 128 KiB


class Cache:
    """Pages of that shape, half of them for what is loaded."""

    def __init__(self, device: Device, folder: Path, blocks: int) -> None:
        self.blocks, self.records = blocks, kv(np.random.default_rng(1), SHAPE, blocks)
        self.tables = calibrate(self.records[:16], SHAPE)
        self.tables.save(folder / "t", SHAPE)
        tensors = [Tensor(device, (2, 2 * blocks, SHAPE.tokens, 4, 128)) for _ in range(SHAPE.layers)]
        self.cache = PagedCache(device, tensors, 1)
        self.order = np.random.default_rng(2).permutation(2 * blocks)
        self.path = folder / "t"

    def fill(self, records: npt.NDArray[np.uint8]) -> None:
        """``records`` into the first half of ``order``."""
        parts = records.reshape(len(records), SHAPE.layers, 2, -1)
        for layer, tensor in enumerate(self.cache.tensors):
            data = np.full(tensor.buffer.nbytes, 0xFF, np.uint8).reshape(2, 2 * self.blocks, -1)
            data[:, self.order[: len(records)]] = parts[:, layer].swapaxes(0, 1)
            tensor.buffer.write(data.reshape(-1))

    def read(self, pages: Any) -> npt.NDArray[np.uint8]:
        parts = [t.buffer.read().reshape(2, 2 * self.blocks, -1)[:, pages].swapaxes(0, 1) for t in self.cache.tensors]
        return np.stack(parts, 1).reshape(len(pages), -1)

    def engine(self, **options: Any) -> KVortexEngine:
        config = {"device": self.cache.device.name, "calibrate": "never", "cpu_pool_size_bytes": self.blocks << 17}
        config |= {"codec_tables": str(self.path)}
        return KVortexEngine.create(KVortexConfig(**config | options), self.cache.layout)


@pytest.mark.gpu
@pytest.mark.parametrize("staging", [1 << 20, 64 << 20])
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("name", CODED)
def test_many_chunks(name: str, staging: int, busy: bool, tmp_path: Path) -> None:
    """Records in slots are the CPU's, byte for byte, and come back so; saves and loads under way together are each right.

    Every 60th block is the first of its sequence, which a codec with loss keeps in parts.
    """
    cache = Cache(open_device("cuda"), tmp_path, 300)
    records, first = cache.records.copy(), np.arange(300) % 60 == 5
    records[11] = np.random.default_rng(3).integers(0, 256, SHAPE.raw_bytes, np.uint8)
    records[11].view(np.uint16)[77] = 0x7F80
    cache.fill(records)
    source, target = cache.order[:300], cache.order[300:]
    codec = make_codec(name, SHAPE, cache.tables)
    coded, back = np.zeros((300, codec.slot_bytes), np.uint8), np.empty_like(records)
    fits = codec.encode_into(records, coded) > 0
    assert not fits[11] and fits.sum() > 280 and fits[first].all()
    codec.decode_into(coded, back)
    back[first] = records[first]
    options = {"codec": name, "gpu_pool_size_bytes": staging, "beside_compute": busy, "cpu_pool_size_bytes": 600 << 17}
    there = np.flatnonzero(fits)
    seen = np.flatnonzero(fits & (codec.exact | ~first))[::7]
    with cache.engine(**options) as engine:
        keys = keys_of(*range(600))
        for turn in range(3):
            engine.drop_blocks(keys)
            assert (engine.save_blocks(keys[:300], source, first=first).wait() == fits).all()
            for at, slot in zip(seen, slots_of(engine, keys[seen]), strict=True):
                assert (slot_of(engine, slot)[: codec.slot_bytes] == coded[at]).all()
            again = engine.save_blocks(keys[300:], source, first=first)
            load = engine.load_blocks(keys[:300], target, first=first)
            assert (load.wait() == fits).all() and load.error is None and (again.wait() == fits).all()
            assert (cache.read(target[fits]) == back[fits]).all()
            cache.fill(records)
            load = engine.load_blocks(keys[300:][there], target[there], first=first[there])
            assert load.wait().all() and (cache.read(target[there]) == back[there]).all(), turn
            cache.fill(records)
