"""How fast do the kernels of the lossless codec run, alone? Pages in VRAM to coded records in VRAM, and back.

Pages have Llama-3-8B's shape (32 layers, 8 heads of 128) and hold real KV, a small model's pages tiled whole, so that channels
keep their structure; or, where the sample is not there, numbers drawn with a scale and an offset for each channel. Blocks are
taken in random order. ``save`` is :func:`plane_encode`, ``load`` :func:`plane_decode_digest`: what transfers launch, digests
included. ``rate``: GB/s of original bytes, medians, between events; ``run``: tiles that a warp takes at a time.
``wrong_bytes``: all pages after a load elsewhere, coded records against the host's twin, and digests that are not the host's.
On the host: the twin itself.
:mod:`perf.coder_lossy` adds rows of the codecs of bounded loss, :mod:`perf.coder_cachegen` of codec ``cachegen``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

import kvortex
from kvortex.codecs import RecordShape, calibrate, make_codec
from kvortex.codecs.on_device import cells, constants
from kvortex.codecs.plane import PlaneCodec
from kvortex.devices.cuda import CudaDevice
from perf import coder_cachegen, coder_lossy
from perf.clock import HostClock
from perf.codecs import SAMPLE, sample
from perf.coder_bench import Bench, pitch_of, threads_of, wrong_digests
from perf.report import Report, progress

SHAPE = RecordShape(32, 8, 128)
RUNS = (4, 8, 12, 16)  # of 1,024 tiles in a block
CTAS_EACH = 4  # of 256 threads a multiprocessor, as many as its registers hold
CHECKED = 8  # blocks whose coded record is compared with the host's
NAMES = "plane_encode", "plane_decode_digest"
KEYS = ("kernel", "run")
BETTER = {"rate": "higher"}
COLUMNS = (*KEYS, "rate", "us", "ratio", "wrong_bytes")
Bytes = npt.NDArray[np.uint8]


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, a row for each direction and run, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    on_gpu = isinstance(device, CudaDevice)
    blocks, rounds = (8, 2) if quick else (512, 31) if on_gpu else (32, 7)
    progress(f"{blocks} blocks")
    records = realistic(blocks)
    codec = make_codec("plane", SHAPE, calibrate(records[: min(blocks, 12)], SHAPE))
    assert isinstance(codec, PlaneCodec)
    rows = _on_gpu(device, codec, records, rounds) if isinstance(device, CudaDevice) else _on_host(codec, records, rounds)
    rows += coder_lossy.rows(device, records, SHAPE, rounds)
    rows += coder_cachegen.rows(device, records, SHAPE, rounds)
    notes = {"blocks": blocks, "block_bytes": SHAPE.raw_bytes, "rounds": rounds, "unit": "GB/s of original bytes, medians"}
    notes["pages"] = SAMPLE.name if SAMPLE.exists() else "drawn"
    if on_gpu:
        notes |= {"threads": [threads_of(name) for name in NAMES], "ctas_a_multiprocessor": CTAS_EACH}
    return device.name, rows, notes


def realistic(count: int) -> Bytes:
    """(count, raw_bytes): each plane of a block is one of a real page's, side by side until its row is full."""
    planes, channels = SHAPE.planes, SHAPE.channels
    made = np.empty((count, planes, SHAPE.tokens, channels), np.uint16)
    if not SAMPLE.exists():
        rng = np.random.default_rng(0)
        spread, offset = np.exp2(rng.integers(-4, 4, (planes, 1, channels))), rng.normal(size=(planes, 1, channels))
        for block in made:
            numbers = (rng.normal(size=block.shape) + offset) * spread
            block[:] = numbers.astype(np.float32).view(np.uint32) >> 16
        return made.reshape(count, -1).view(np.uint8)
    values = sample(SAMPLE, "qwen")
    layers, _, tokens, _, _ = values.shape
    pages = values.reshape(layers, 2, tokens // 16, 16, -1)
    for at, block in enumerate(made):
        for plane in range(planes):
            page = pages[(plane // 2) % layers, plane % 2, 1 + at % (tokens // 16 - 1)]
            block[plane] = np.tile(page, (1, channels // page.shape[1]))
    return made.reshape(count, -1).view(np.uint8)


def _on_host(codec: PlaneCodec, records: Bytes, rounds: int) -> list[dict[str, Any]]:
    coded, back, clock = np.zeros((len(records), codec.slot_bytes), np.uint8), np.zeros_like(records), HostClock()
    sizes = codec.encode_into(records, coded)
    codec.decode_into(coded, back)
    facts = {"ratio": float(records.size / sizes.sum()), "wrong_bytes": int((back != records).sum())}
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: codec.encode_into(records, coded), "load": lambda: codec.decode_into(coded, back)
    }
    return [_row(name, 0, [clock.seconds(call) for _ in range(rounds)], records.size) | facts for name, call in calls.items()]


def _row(kernel: str, run: int, seconds: list[float], nbytes: int) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {"kernel": kernel, "run": run, "rate": nbytes / middle / 1e9, "us": middle * 1e6}


def _on_gpu(device: CudaDevice, codec: PlaneCodec, records: Bytes, rounds: int) -> list[dict[str, Any]]:
    bench, n = Bench(device, SHAPE, records, codec.slot_bytes, NAMES, CTAS_EACH), len(records)
    pitch, fixed = pitch_of(codec.slot_bytes), bench.upload(constants(codec))
    form = bench.upload(cells(codec, bench.fragments, fixed.address))
    counts, status = bench.upload(np.zeros((n, 1 + codec.tiles), np.uint32)), device.allocate(4 * n)
    source, target = bench.upload(bench.source), bench.upload(bench.target)

    where = bench.numbers, bench.sums

    def save(run: int) -> None:
        bench.launch("plane_encode", pitch, form, counts, source, n, run, *where, status)

    def load(run: int) -> None:
        bench.launch("plane_decode_digest", pitch, form, status, target, n, run, *where)

    rows, empty = [], np.isin(np.arange(bench.pages), bench.target)[:, None]
    for run in RUNS:
        progress(f"run {run}")
        status.write(np.zeros(4 * n, np.uint8))
        times = {"save": [bench.clock.seconds(lambda: save(run)) for _ in range(rounds)]}  # noqa: B023
        wrong, used = _wrong_records(codec, bench.staging, records, pitch)
        few = min(CHECKED, n)
        wrong += sum(wrong_digests(bench, lambda: move(run), pitch, few) for move in (save, load))  # noqa: B023
        times["load"] = [bench.clock.seconds(lambda: load(run)) for _ in range(rounds)]  # noqa: B023
        wrong += int(status.read().view(np.uint32).sum())
        for plane in range(SHAPE.planes):
            data = bench.read_plane(plane)
            wrong += int((data[bench.target] != bench.of_plane(records, plane)).sum())
            bench.write_plane(plane, np.where(empty, 0, data).astype(np.uint8))
        facts = {"ratio": float(records.size / used), "wrong_bytes": wrong}
        rows += [_row(name, run, seconds, records.size) | facts for name, seconds in times.items()]
    bench.clock.close()
    return rows


def _wrong_records(codec: PlaneCodec, staging: Any, records: Bytes, pitch: int) -> tuple[int, int]:
    """Bytes that differ from the host's in some records, and bytes that all records use."""
    seen = staging.read().reshape(len(records), pitch)
    used = int(np.ascontiguousarray(seen[:, 24:32]).view(np.uint64).sum())
    mine = np.zeros((min(CHECKED, len(records)), pitch), np.uint8)
    sizes = codec.encode_into(records[: len(mine)], mine)
    return sum(int((a[:size] != b[:size]).sum()) for a, b, size in zip(seen, mine, sizes, strict=False)), used


def draw(axes: Any, report: Report) -> None:
    """Rate by run."""
    for direction, colour in (("save", "#27608f"), ("load", "#d0792a")):
        rows = [row for row in report.rows if row["kernel"] == direction]
        axes.plot([row["run"] for row in rows], [row["rate"] for row in rows], "o-", color=colour, label=direction)
    axes.set_ylim(0)
    axes.set_xlabel("tiles that a warp takes at a time (0: the host's twin)")
    axes.set_ylabel("GB/s of original bytes")
    axes.set_title(f"The lossless codec alone, {report.device}", fontsize=10)
    axes.legend()
