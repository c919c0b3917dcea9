"""Rows of ``perf plane`` for codec ``cachegen``: pages in VRAM to coded records there and back, by level and blocks at a time.

``save`` is :func:`cachegen_count` and :func:`cachegen_encode`, one behind the other; ``load`` is :func:`cachegen_decode`.
``wrong_bytes``: records against the host's twin, and what a load put elsewhere against what the twin decodes, of the first
``CHECKED`` blocks and of all that are equal to one of them. On the host: the twin itself, and records that it cannot read.
"""

from __future__ import annotations

import ctypes
import statistics
from typing import Any

import numpy as np
import numpy.typing as npt

import kvortex
from kvortex.codecs import RecordShape, calibrate, make_codec
from kvortex.codecs.cachegen import CacheGenCodec
from kvortex.codecs.on_device_cachegen import cells, constants
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.kernels import build
from perf.clock import CudaClock, HostClock
from perf.report import progress

LEVELS = (1, 2)
BATCHES = (64, 8)  # blocks of a launch, besides all
THREADS, CTAS_EACH = 256, 4  # of a CTA; CTAs a multiprocessor
CHECKED = 16
NAMES = "cachegen_count", "cachegen_encode", "cachegen_decode"
Bytes = npt.NDArray[np.uint8]


def rows(device: Any, records: Bytes, shape: RecordShape, rounds: int) -> list[dict[str, Any]]:
    """Of (n, raw_bytes) records of a shape."""
    made = []
    for level in LEVELS:
        progress(f"cachegen, level {level}")
        codec = make_codec("cachegen", shape, calibrate(records[:12], shape), level=level)
        assert isinstance(codec, CacheGenCodec)
        made += _on_gpu(device, codec, records, rounds) if isinstance(device, CudaDevice) else _on_host(codec, records[:4])
    return made


def _row(name: str, codec: CacheGenCodec, run: int, seconds: list[float], nbytes: int) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {"kernel": f"cachegen {codec.level}, {name}", "run": run, "rate": nbytes / middle / 1e9, "us": middle * 1e6}


def _on_host(codec: CacheGenCodec, records: Bytes) -> list[dict[str, Any]]:
    coded, back, clock = np.zeros((len(records), codec.slot_bytes), np.uint8), np.zeros_like(records), HostClock()
    save = [clock.seconds(lambda: codec.encode_into(records, coded)) for _ in range(2)]
    load = [clock.seconds(lambda: codec.decode_into(coded, back)) for _ in range(2)]
    sizes, told = codec.encode_into(records, coded), codec.decode_into(coded, back)
    facts = {"ratio": float(records.size / sizes.sum()), "wrong_bytes": int((~told).sum())}
    return [_row(name, codec, 0, times, records.size) | facts for name, times in (("save", save), ("load", load))]


class _Bench:
    """A codec's pages, records and kernels on a GPU: pages ``source`` hold the records, pages ``target`` nothing yet."""

    def __init__(self, device: CudaDevice, codec: CacheGenCodec, records: Bytes) -> None:
        self.device, self.codec, self.records, n = device, codec, records, len(records)
        shape, pages = codec.shape, 2 * n
        order = np.random.default_rng(1).permutation(pages).astype(np.int32)
        self.source, self.target = order[:n], order[n:]
        self.pitch = -(-codec.slot_bytes // 16) * 16
        self.memory, self.staging = device.allocate(pages * shape.raw_bytes), device.allocate(n * self.pitch)
        for plane in range(shape.planes):  # a plane of all pages at a time
            data = np.zeros((pages, shape.plane_bytes), np.uint8)
            data[self.source] = records[:, plane * shape.plane_bytes : (plane + 1) * shape.plane_bytes]
            self.memory.write(data.reshape(-1), plane * data.size)
        sizes = shape.planes, pages, shape.tokens, shape.channels
        strides = tuple(2 * int(np.prod(sizes[at + 1 :])) for at in range(4))
        layout = kvortex.KVLayout.from_pointers((self.memory.address, sizes, strides, 2), 1, 0, device=device.name)
        fixed = self.upload(constants(codec))
        self.form = self.upload(cells(codec, layout.fragments, fixed.address))
        self.fixed, self.ids = fixed, {"save": self.upload(self.source), "load": self.upload(self.target)}
        self.counts, self.status = device.allocate(8 * n * codec.streams), self.upload(np.zeros(n, np.uint32))
        self.clock, self._functions = CudaClock(device), {}
        for name in NAMES:
            cubin = build.load(name, device.compute_capability)
            with cu.current(device.context) as driver:
                module = cu.check(driver.cuModuleLoadData(cubin.code), "cuModuleLoadData")
                found = driver.cuModuleGetFunction(module, cubin.entry.encode())
                self._functions[name] = cu.check(found, "cuModuleGetFunction")

    def upload(self, array: npt.NDArray[Any]) -> Any:
        held = self.device.allocate(array.nbytes)
        held.write(array.reshape(-1).view(np.uint8))
        return held

    def launch(self, name: str, extra: Any, ids: Any, blocks: int) -> None:
        u64, i32 = ctypes.c_uint64, ctypes.c_int32
        values = (self.staging.address, self.pitch, self.form.address, extra.address, ids.address, blocks, 1)
        grid = CTAS_EACH * self.device.multiprocessors
        with cu.current(self.device.context) as driver:
            packed = values, (u64, u64, u64, u64, u64, i32, i32)
            launched = driver.cuLaunchKernel(self._functions[name], grid, 1, 1, THREADS, 1, 1, 0, self.clock.stream, packed, 0)
            cu.check(launched, f"cuLaunchKernel of {name}")

    def save(self, blocks: int) -> None:
        self.launch("cachegen_count", self.counts, self.ids["save"], blocks)
        self.launch("cachegen_encode", self.counts, self.ids["save"], blocks)

    def load(self, blocks: int) -> None:
        self.launch("cachegen_decode", self.status, self.ids["load"], blocks)

    def checked(self) -> tuple[int, float]:
        """Bytes that differ from the twin's after a save and a load of all, and the ratio."""
        shape, codec, n = self.codec.shape, self.codec, len(self.records)
        seen = self.staging.read().reshape(n, self.pitch)
        used = np.ascontiguousarray(seen[:, 24:32]).view(np.uint64)[:, 0].astype(np.int64)
        place = {data: at for at, data in reversed(list(enumerate(row.tobytes() for row in self.records[:CHECKED])))}
        like = np.array([place.get(row.tobytes(), -1) for row in self.records])  # one of the first that is the same
        mine, back = np.zeros((len(self.records[:CHECKED]), self.pitch), np.uint8), np.zeros_like(self.records[:CHECKED])
        sizes = codec.encode_into(self.records[:CHECKED], mine)
        wrong = int((~codec.decode_into(mine, back)).sum()) + int(self.status.read().view(np.uint32).sum())
        for row, size, at in zip(seen, used, like, strict=True):
            if at >= 0:
                wrong += int((row[: sizes[at]] != mine[at, : sizes[at]]).sum()) + int(size != sizes[at])
        for plane in range(shape.planes):
            data = self.memory.read(plane * 2 * n * shape.plane_bytes, 2 * n * shape.plane_bytes).reshape(2 * n, -1)
            wanted = back[like, plane * shape.plane_bytes : (plane + 1) * shape.plane_bytes]
            wrong += int((data[self.target] != wanted)[like >= 0].sum())
        return wrong, float(self.records.size / used.sum())


def _on_gpu(device: CudaDevice, codec: CacheGenCodec, records: Bytes, rounds: int) -> list[dict[str, Any]]:
    bench, made = _Bench(device, codec, records), []
    n = len(records)
    for blocks in (n, *(few for few in BATCHES if few < n)):
        save = [bench.clock.seconds(lambda: bench.save(blocks)) for _ in range(rounds)]  # noqa: B023
        load = [bench.clock.seconds(lambda: bench.load(blocks)) for _ in range(rounds)]  # noqa: B023
        if blocks == n:
            wrong, ratio = bench.checked()
        few = "" if blocks == n else f" of {blocks}"
        for name, seconds in (("save", save), ("load", load)):
            row = _row(name + few, codec, 1, seconds, blocks * codec.shape.raw_bytes)
            made.append(row | {"ratio": ratio, "wrong_bytes": wrong})
    bench.clock.close()
    return made
