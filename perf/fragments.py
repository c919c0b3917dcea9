"""How fast do blocks of small fragments cross the link, against one contiguous DMA of as many bytes?

A block is 32 layers of K and V, so 64 fragments. As many blocks as make the payload are saved from, and loaded to,
pages drawn at random from twice as many. Raw copies and transfers alternate; figures are medians of device-timed runs;
every byte is verified after the first and the last round.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np

import kvortex
from kvortex.devices import Device
from perf.raw import RawCopy
from perf.report import Report

LAYERS = 32
FRAGMENT_BYTES = (4 << 10, 16 << 10, 18 << 10, 32 << 10, 128 << 10)
_RATES = ("raw_save", "save", "save_ratio", "raw_load", "load", "load_ratio")
COLUMNS = ("fragment_kib", "blocks", *_RATES, "submit_us", "wrong_bytes")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, one row a fragment size, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    payload, rounds = (8 << 20, 2) if quick else (512 << 20, 9)
    raw = RawCopy(device, payload)
    rows = []
    try:
        for fragment_bytes in FRAGMENT_BYTES:
            print(f"fragments of {fragment_bytes >> 10} KiB …", file=sys.stderr, flush=True)
            rows.append(_one_size(device, raw, fragment_bytes, payload, rounds))
    finally:
        raw.close()
    notes = {"payload_bytes": payload, "rounds": rounds, "fragments_per_block": 2 * LAYERS, "unit": "GB/s of payload, medians"}
    return device.name, rows, notes


def _one_size(device: Device, raw: RawCopy, fragment_bytes: int, payload: int, rounds: int) -> dict[str, Any]:
    count = max(1, payload // (2 * LAYERS * fragment_bytes))
    pages = 2 * count
    memory = device.allocate(LAYERS * 2 * pages * fragment_bytes)
    layer_bytes = 2 * pages * fragment_bytes
    shape, strides = (2, pages, fragment_bytes), (pages * fragment_bytes, fragment_bytes, 1)
    specs = [kvortex.TensorSpec(memory.address + at * layer_bytes, shape, strides, 1, device.name) for at in range(LAYERS)]
    layout = kvortex.KVLayout.from_pointers(specs, block_axis=1, device=device.name)
    slot_bytes = -(-layout.record_bytes // 4096) * 4096
    config = kvortex.KVortexConfig.from_env(cpu_pool_size_bytes=count * slot_bytes, device=device.name)
    rng = np.random.default_rng(fragment_bytes)
    times: dict[str, list[float]] = {name: [] for name in ("raw_save", "save", "raw_load", "load", "submit")}
    wrong = 0
    with kvortex.KVortexEngine.create(config, layout) as engine:
        moved = count * layout.record_bytes
        for turn in range(rounds):
            verify = turn in (0, rounds - 1)
            source, target = (part for part in rng.permutation(pages).reshape(2, count))
            if verify:
                before = rng.integers(0, 1 << 63, memory.nbytes // 8, np.int64).view(np.uint8)
                memory.write(before)
            keys = rng.integers(0, 256, (count, 32), np.uint8)
            raw_save = raw.seconds(to_host=True)
            began = time.perf_counter()
            save = engine.save_blocks(keys, source)
            submitted = time.perf_counter() - began
            save.wait()
            raw_load = raw.seconds(to_host=False)
            load = engine.load_blocks(keys, target)
            if not load.wait().all() or save.nbytes != moved or load.nbytes != moved:
                raise kvortex.TransferError(f"a transfer of {moved} bytes failed: {save.error or load.error}")
            if verify:
                wrong += _wrong_bytes(before, memory.read(), source, target, fragment_bytes)
            if turn:  # the first round pays for page tables and clocks
                for name, value in zip(times, (raw_save, save.seconds, raw_load, load.seconds, submitted), strict=True):
                    times[name].append(value)
    memory.free()
    return _row(fragment_bytes, count, raw.nbytes, moved, {name: statistics.median(t) for name, t in times.items()}, wrong)


def _row(fragment_bytes: int, count: int, raw_bytes: int, moved: int, median: dict[str, float], wrong: int) -> dict[str, Any]:
    rate = {name: (raw_bytes if name.startswith("raw") else moved) / seconds / 1e9 for name, seconds in median.items()}
    return {
        "fragment_kib": fragment_bytes >> 10,
        "fragment_bytes": fragment_bytes,
        "blocks": count,
        "moved_bytes": moved,
        "raw_save": rate["raw_save"],
        "save": rate["save"],
        "save_ratio": rate["save"] / rate["raw_save"],
        "raw_load": rate["raw_load"],
        "load": rate["load"],
        "load_ratio": rate["load"] / rate["raw_load"],
        "submit_us": median["submit"] * 1e6,
        "wrong_bytes": wrong,
    }


def _wrong_bytes(before: Any, after: Any, source: Any, target: Any, fragment_bytes: int) -> int:
    """Bytes that are not the ones saved, in the loaded pages; and bytes that changed, in all others."""
    old = before.reshape(LAYERS, 2, -1, fragment_bytes)
    new = after.reshape(LAYERS, 2, -1, fragment_bytes)
    others = np.setdiff1d(np.arange(old.shape[2]), target)
    wrong = 0
    for layer in range(LAYERS):
        wrong += int((new[layer][:, target] != old[layer][:, source]).sum())
        wrong += int((new[layer][:, others] != old[layer][:, others]).sum())
    return wrong


def draw(axes: Any, report: Report) -> None:
    """Share of a raw DMA by fragment size, both ways."""
    at = np.arange(len(report.rows))
    for shift, name, colour in ((-0.2, "save", "#27608f"), (0.2, "load", "#d0792a")):
        heights = [row[f"{name}_ratio"] for row in report.rows]
        bars = axes.bar(at + shift, heights, 0.38, label=name, color=colour)
        axes.bar_label(bars, [f"{row[name]:.1f}" for row in report.rows], label_type="center", color="white", fontsize=9)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(at, [f"{row['fragment_kib']} KiB" for row in report.rows])
    axes.set_ylim(0, 1.2 * max(1.0, *(max(row["save_ratio"], row["load_ratio"]) for row in report.rows)))
    axes.set_xlabel("fragment")
    axes.set_ylabel("share of one contiguous DMA (in bars: GB/s)")
    name = report.environment["device"].get("gpu", "host device")
    axes.set_title(f"Paged blocks between device and pinned RAM, {name}", fontsize=10)
    axes.legend(loc="upper right", ncols=2)
