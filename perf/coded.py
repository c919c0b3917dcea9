"""How fast do coded blocks cross the link, in bytes of what they were, beside one contiguous DMA of as many bytes?

Pages have Llama-3-8B's shape (32 layers, 8 heads of 128, blocks of 16 tokens: 2 MiB) and hold the numbers of ``perf plane``, in
each block others. Engines save blocks from pages drawn at random and load them into others; a row for each codec that has a way
on this device, and for each size of the staging buffers of both directions together, 0 for what the engine takes by itself.
``save`` and ``load``: GB/s of original bytes, medians of device-timed calls; raw DMAs and all engines take turns. ``ratio``:
bytes of pages to bytes that the records use; ``slot``: what a slot reserves of them. ``wrong_bytes``: every byte of the pages,
behind the timed calls; with a codec with loss, against what the codec's own calls make of a few blocks.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kvortex
from kvortex.codecs import CODECS, Tables, calibrate
from kvortex.codecs.base import HEADER
from kvortex.devices import Device
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import ConfigError
from perf.pages import Ids, moved
from perf.plane import SHAPE, realistic
from perf.raw import RawCopy
from perf.report import Report, progress

STAGING_MIB = (0, 256, 1024)
DISTINCT, LEARNT, CHECKED = 32, 12, 4  # blocks: that are drawn, that tables are of, and that codecs with loss are held to
KEYS = ("codec", "staging_mib")
BETTER = {"save": "higher", "save_ratio": "higher", "load": "higher", "load_ratio": "higher"}
COLUMNS = (*KEYS, "blocks", "ratio", "slot", *BETTER, "wrong_bytes")
Bytes = npt.NDArray[np.uint8]


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, a row for each codec and size of buffers, and what the rows have in common."""
    device = kvortex.open_device(device_name)
    on_gpu = isinstance(device, CudaDevice)
    blocks, rounds = (4, 2) if quick else (512, 11) if on_gpu else (32, 5)
    progress(f"{blocks} blocks of {SHAPE.raw_bytes >> 20} MiB")
    pages, found = Pages(device, blocks), []
    notes = {"blocks": blocks, "block_bytes": SHAPE.raw_bytes, "rounds": rounds, "unit": "GB/s of original bytes, medians"}
    with contextlib.ExitStack() as stack:
        raw = RawCopy(device, blocks * SHAPE.raw_bytes)
        stack.callback(raw.close)
        wrong = raw.wrong_bytes(min(raw.nbytes, 64 << 20))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        tables = calibrate(pages.records(np.arange(min(blocks, LEARNT))), SHAPE)
        tables.save(Path(folder, "tables"), SHAPE)
        for staging in STAGING_MIB if on_gpu else (0,):
            found += _engines(device, pages, Path(folder, "tables"), tables, staging, notes)
        for one in found:
            stack.callback(one.engine.shutdown)
        floor: dict[str, list[float]] = {"save": [], "load": []}
        for turn in range(rounds + 1):
            for one in found:
                one.turn(keep=turn > 0)
            for way, seconds in floor.items():
                seconds.append(raw.seconds(to_host=way == "save"))
        rates = {way: raw.nbytes / statistics.median(seconds[1:]) / 1e9 for way, seconds in floor.items()}
        ratios = {f"{way}_ratio": 1.0 for way in rates}
        rows = [{"codec": "one DMA", "staging_mib": 0, "blocks": blocks, "ratio": 1.0, "slot": 1.0, **rates, **ratios}]
        rows[0]["wrong_bytes"] = wrong
        for one in found:
            progress(f"checks {one.name}, {one.staging} MiB")
            rows.append(one.row(rates))
    return device.name, rows, notes


def _engines(
    device: Device, pages: Pages, path: Path, tables: Tables, staging: int, notes: dict[str, Any]
) -> list[Coded]:
    """One for each codec that has a way here; the others are told by the notes."""
    made = []
    for name in CODECS:
        options = {"codec": name, "gpu_pool_size_bytes": staging << 20 or None, "device": device.name}
        slot = CODECS[name](SHAPE, tables).slot_bytes if name != "raw" else SHAPE.raw_bytes  # type: ignore[call-arg]
        options |= {"cpu_pool_size_bytes": pages.count * -(-slot // 4096) * 4096, "codec_tables": str(path)}
        try:
            engine = kvortex.KVortexEngine.create(kvortex.KVortexConfig(**options), pages.layout)
        except ConfigError as error:
            notes.setdefault("left_out", {})[name] = str(error)
            continue
        engine.wait_ready()
        made.append(Coded(engine, pages, name, staging))
    return made


class Pages:
    """Twice as many pages as blocks that move, of two sets drawn at random."""

    def __init__(self, device: Device, count: int) -> None:
        self.count = count
        shape = SHAPE.planes, 2 * count, SHAPE.tokens, SHAPE.channels
        strides = tuple(2 * int(np.prod(shape[at + 1 :])) for at in range(4))
        self._memory = device.allocate(2 * int(np.prod(shape)))
        spec = kvortex.TensorSpec(self._memory.address, shape, strides, 2, device.name, self)
        self.layout = kvortex.KVLayout.from_pointers(spec, 1, 0, device=device.name)
        self.source, self.target = np.random.default_rng(1).permutation(2 * count).reshape(2, count)
        self._drawn = realistic(min(count, DISTINCT)).view(np.uint16).reshape(-1, *shape[:1], *shape[2:])
        data = self._memory.read().view(np.uint16).reshape(shape)
        data[:] = 0
        for at, page in enumerate(self.source):
            data[:, page] = self._block(at)
        self._memory.write(data.reshape(-1).view(np.uint8))

    def _block(self, at: int) -> npt.NDArray[np.uint16]:
        """One that was drawn, with signs and mantissas of its own."""
        other, block = divmod(at, len(self._drawn))
        return self._drawn[block] ^ np.uint16(other & 0x7F | (other << 8) & 0x8000)

    def records(self, blocks: Ids) -> Bytes:
        """(n, raw_bytes): what the pages of ``source`` hold."""
        return np.stack([self._block(int(at)).reshape(-1) for at in blocks]).view(np.uint8)

    def clear(self) -> None:
        """Ones in all bits of the pages of ``target``."""
        data = self._all()
        data[:, self.target] = 0xFFFF
        self._memory.write(data.reshape(-1).view(np.uint8))

    def wrong_bytes(self, wanted: Bytes | None) -> int:
        """Bytes of all pages that are not what they should be: in ``target`` what is in ``source``, or the first few
        ``wanted``."""
        data, wrong = self._all(), 0
        for at, (source, target) in enumerate(zip(self.source, self.target, strict=True)):
            block = self._block(at)
            wrong += int((data[:, source] != block).sum())
            if wanted is None:
                wrong += int((data[:, target] != block).sum())
            elif at < len(wanted):
                wrong += int((data[:, target].reshape(-1) != wanted[at].view(np.uint16)).sum())
        return 2 * wrong

    def _all(self) -> npt.NDArray[np.uint16]:
        return self._memory.read().view(np.uint16).reshape(SHAPE.planes, 2 * self.count, SHAPE.tokens, SHAPE.channels)


class Coded:
    """An engine with a codec over the pages."""

    def __init__(self, engine: kvortex.KVortexEngine, pages: Pages, name: str, staging: int) -> None:
        self.engine, self.name, self.staging, self._pages = engine, name, staging, pages
        self._keys = np.random.default_rng(2).integers(0, 256, (pages.count, 32), np.uint8)
        self._seconds: dict[str, list[float]] = {"save": [], "load": []}
        self._nbytes = 0

    def turn(self, *, keep: bool) -> None:
        """A save and a load, of keys that are new."""
        self._keys.view(np.int64)[:, 0] += 1
        save = moved(self.engine.save_blocks(self._keys, self._pages.source, first=False))
        load = moved(self.engine.load_blocks(self._keys, self._pages.target, first=False))
        self._nbytes = save.nbytes
        if keep:
            self._seconds["save"].append(save.seconds)
            self._seconds["load"].append(load.seconds)

    def row(self, floor: dict[str, float]) -> dict[str, Any]:
        """What was measured, and a last load that is checked."""
        codec, pages = self.engine.codec, self._pages
        pages.clear()
        moved(self.engine.load_blocks(self._keys, pages.target, first=False))
        wanted, slot, used = None, SHAPE.raw_bytes, float(SHAPE.raw_bytes)
        if codec is not None:
            some = pages.records(np.arange(min(pages.count, CHECKED)))
            coded = np.zeros((len(some), codec.slot_bytes), np.uint8)
            codec.encode_into(some, coded)
            slot, used = codec.slot_bytes, float(coded[:, : HEADER.itemsize].view(HEADER)["used_bytes"].mean())
            if not codec.exact:
                used, wanted = float(slot), np.empty_like(some)
                codec.decode_into(coded, wanted)
        row: dict[str, Any] = {"codec": self.name, "staging_mib": self.staging, "blocks": pages.count}
        row |= {"ratio": SHAPE.raw_bytes / used, "slot": slot / SHAPE.raw_bytes, "wrong_bytes": pages.wrong_bytes(wanted)}
        for way, seconds in self._seconds.items():
            row[way] = self._nbytes / statistics.median(seconds) / 1e9
            row[f"{way}_ratio"] = row[way] / floor[way]
            row[f"{way}_best_ratio"] = self._nbytes / min(seconds) / 1e9 / floor[way]
        return row


def draw(axes: Any, report: Report) -> None:
    """Bars for each codec, the best of its buffers."""
    names = list(dict.fromkeys(row["codec"] for row in report.rows))
    for shift, way, colour in ((-0.2, "save", "#27608f"), (0.2, "load", "#d0792a")):
        rates = [max(row[way] for row in report.rows if row["codec"] == name) for name in names]
        axes.bar(np.arange(len(names)) + shift, rates, 0.4, color=colour, label=way)
        for at, rate in enumerate(rates):
            axes.annotate(f"{rate / rates[0]:.2f}x", (at + shift, rate), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("GB/s of original bytes")
    axes.set_title(f"Coded blocks across the link, {report.device}", fontsize=10)
    axes.legend()
