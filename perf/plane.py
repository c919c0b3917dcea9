"""How fast do the kernels of the lossless codec run, alone? Pages in VRAM to coded records in VRAM, and back.

Pages have Llama-3-8B's shape (32 layers, 8 heads of 128) and hold real KV, a small model's pages tiled whole, so that channels
keep their structure; or, where the sample is not there, numbers drawn with a scale and an offset for each channel. Blocks are
taken in random order. ``save`` is :func:`plane_count` and :func:`plane_encode`, one behind the other; ``load`` is
:func:`plane_decode`. ``rate``: GB/s of original bytes, medians, between events; ``run``: tiles that a warp takes at a time.
``wrong_bytes``: all pages after a load elsewhere, and coded records against the host's twin. On the host: the twin itself.
:mod:`perf.coder_lossy` adds rows of the codecs of bounded loss, :mod:`perf.coder_cachegen` of codec ``cachegen``.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

import kvortex
from kvortex.codecs import RecordShape, calibrate, make_codec
from kvortex.codecs.on_device import cells, constants
from kvortex.codecs.plane import PlaneCodec
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.kernels import build
from perf import coder_cachegen, coder_lossy
from perf.clock import CudaClock, HostClock
from perf.codecs import SAMPLE, sample
from perf.report import Report, progress

SHAPE = RecordShape(32, 8, 128)
RUNS = (4, 16, 64)  # of 1,024 tiles in a block
THREADS, CTAS_EACH = 256, 4  # of a CTA; CTAs a multiprocessor
CHECKED = 8  # blocks whose coded record is compared with the host's
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
        notes |= {"threads": THREADS, "ctas_a_multiprocessor": CTAS_EACH}
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
    n, pages = len(records), 2 * len(records)
    order = np.random.default_rng(1).permutation(pages).astype(np.int32)
    source, target = order[:n], order[n:]
    shape, itemsize = (SHAPE.planes, pages, SHAPE.tokens, SHAPE.channels), 2
    strides = tuple(itemsize * int(np.prod(shape[at + 1 :])) for at in range(4))
    pitch = -(-codec.slot_bytes // 16) * 16
    memory, staging = device.allocate(itemsize * int(np.prod(shape))), device.allocate(n * pitch)
    plane_bytes = itemsize * SHAPE.tokens * SHAPE.channels
    for plane in range(SHAPE.planes):  # a plane of all pages at a time
        data = np.zeros((pages, plane_bytes), np.uint8)
        data[source] = records[:, plane * plane_bytes : (plane + 1) * plane_bytes]
        memory.write(data.reshape(-1), plane * pages * plane_bytes)
    layout = kvortex.KVLayout.from_pointers((memory.address, shape, strides, itemsize), 1, 0, device=device.name)
    fixed, counts, status = (device.allocate(size) for size in (constants(codec).size, 4 * n * codec.tiles, 4 * n))
    fixed.write(constants(codec))
    form_array = cells(codec, layout.fragments, fixed.address)
    form, ids = device.allocate(form_array.nbytes), {}
    form.write(form_array)
    for name, which in (("save", source), ("load", target)):
        ids[name] = device.allocate(which.nbytes)
        ids[name].write(which)
    kernels = Kernels(device)
    clock = CudaClock(device)

    def save(run: int) -> None:
        kernels.launch("plane_count", clock.stream, (staging, pitch, form, counts, ids["save"], n, run))
        kernels.launch("plane_encode", clock.stream, (staging, pitch, form, counts, ids["save"], n, run))

    def load(run: int) -> None:
        kernels.launch("plane_decode", clock.stream, (staging, pitch, form, status, ids["load"], n, run))

    rows = []
    for run in RUNS:
        progress(f"run {run}")
        status.write(np.zeros(n, np.uint32))
        times = {"save": [clock.seconds(lambda: save(run)) for _ in range(rounds)]}  # noqa: B023
        wrong, used = _wrong_records(codec, staging, records, pitch)
        times["load"] = [clock.seconds(lambda: load(run)) for _ in range(rounds)]  # noqa: B023
        wrong += int(status.read().view(np.uint32).sum())
        for plane in range(SHAPE.planes):
            data = memory.read(plane * pages * plane_bytes, pages * plane_bytes).reshape(pages, plane_bytes)
            wrong += int((data[target] != records[:, plane * plane_bytes : (plane + 1) * plane_bytes]).sum())
            memory.write(np.where(np.isin(np.arange(pages), target)[:, None], 0, data).astype(np.uint8).reshape(-1),
                         plane * pages * plane_bytes)
        facts = {"ratio": float(records.size / used), "wrong_bytes": wrong}
        rows += [_row(name, run, seconds, records.size) | facts for name, seconds in times.items()]
    clock.close()
    return rows


def _wrong_records(codec: PlaneCodec, staging: Any, records: Bytes, pitch: int) -> tuple[int, int]:
    """Bytes that differ from the host's in some records, and bytes that all records use."""
    seen = staging.read().reshape(len(records), pitch)
    used = int(np.ascontiguousarray(seen[:, 24:32]).view(np.uint64).sum())
    mine = np.zeros((min(CHECKED, len(records)), pitch), np.uint8)
    sizes = codec.encode_into(records[: len(mine)], mine)
    return sum(int((a[:size] != b[:size]).sum()) for a, b, size in zip(seen, mine, sizes, strict=False)), used


class Kernels:
    """Loaded once, launched over all multiprocessors."""

    def __init__(self, device: CudaDevice) -> None:
        self._device, self._functions = device, {}
        self._grid = CTAS_EACH * device.multiprocessors
        for name in ("plane_count", "plane_encode", "plane_decode"):
            cubin = build.load(name, device.compute_capability)
            with cu.current(device.context) as driver:
                module = cu.check(driver.cuModuleLoadData(cubin.code), "cuModuleLoadData")
                found = driver.cuModuleGetFunction(module, cubin.entry.encode())
                self._functions[name] = cu.check(found, "cuModuleGetFunction")

    def launch(self, name: str, stream: int, arguments: tuple[Any, ...]) -> None:
        """Buffers stand for their addresses."""
        u64, i32 = ctypes.c_uint64, ctypes.c_int32
        values = tuple(getattr(value, "address", value) for value in arguments)
        with cu.current(self._device.context) as driver:
            packed = values, (u64, u64, u64, u64, u64, i32, i32)
            launched = driver.cuLaunchKernel(self._functions[name], self._grid, 1, 1, THREADS, 1, 1, 0, stream, packed, 0)
            cu.check(launched, f"cuLaunchKernel of {name}")


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
