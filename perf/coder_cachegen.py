"""Rows of ``perf plane`` for codec ``cachegen``: pages in VRAM to coded records there and back, by level and blocks at a time.

``save`` is :func:`cachegen_count` and :func:`cachegen_encode`, one behind the other; ``load`` is :func:`cachegen_decode`.
``wrong_bytes``: records against the host's twin, and what a load put elsewhere against what the twin decodes, of the first
``CHECKED`` blocks and of all that are equal to one of them. On the host: the twin itself, and records that it cannot read.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.codecs import RecordShape, calibrate, make_codec
from kvortex.codecs.cachegen import CacheGenCodec
from kvortex.codecs.on_device_cachegen import cells, constants
from kvortex.devices.cuda import CudaDevice
from perf.clock import HostClock
from perf.coder_bench import Bench, pitch_of
from perf.report import progress

LEVELS = (1, 2)
BATCHES = (64, 8)  # blocks of a launch, besides all
CTAS_EACH = 4  # a multiprocessor
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


class _Bench(Bench):
    """A codec's pages, records and kernels."""

    def __init__(self, device: CudaDevice, codec: CacheGenCodec, records: Bytes) -> None:
        super().__init__(device, codec.shape, records, codec.slot_bytes, NAMES, CTAS_EACH)
        self.codec, self.pitch = codec, pitch_of(codec.slot_bytes)
        self.fixed = self.upload(constants(codec))
        self.form = self.upload(cells(codec, self.fragments, self.fixed.address))
        self.ids = {"save": self.upload(self.source), "load": self.upload(self.target)}
        self.counts = device.allocate(8 * len(records) * codec.streams)
        self.status = self.upload(np.zeros(len(records), np.uint32))

    def save(self, blocks: int) -> None:
        for name in ("cachegen_count", "cachegen_encode"):
            self.launch(name, self.pitch, self.form, self.counts, self.ids["save"], blocks, 1)

    def load(self, blocks: int) -> None:
        self.launch("cachegen_decode", self.pitch, self.form, self.status, self.ids["load"], blocks, 1)

    def checked(self) -> tuple[int, float]:
        """Bytes that differ from the twin's after a save and a load of all, and the ratio."""
        codec, n = self.codec, len(self.records)
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
        for plane in range(self.shape.planes):
            missed = self.read_plane(plane)[self.target] != self.of_plane(back, plane)[like]
            wrong += int(missed[like >= 0].sum())
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
