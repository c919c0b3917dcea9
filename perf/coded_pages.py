"""Pages of Llama-3-8B's shape with numbers as a model has them, and engines with a codec over them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kvortex
from kvortex.codecs import CODECS, Codec, calibrate, make_codec
from kvortex.codecs.base import HEADER
from kvortex.devices import Device
from kvortex.errors import ConfigError
from perf.pages import WAYS, Ids, moved
from perf.plane import SHAPE, realistic

DISTINCT, LEARNT, CHECKED = 32, 12, 8  # blocks: that are drawn, that tables are of, and that are held to the codec's own calls
Bytes = npt.NDArray[np.uint8]
Own = Callable[[str, float, float], dict[str, Any]]


class Pages:
    """Twice as many pages as blocks that move, of two sets drawn at random.

    Parameters
    ----------
    device
    count
        Blocks that move at a time.
    folder
        Where tables of some of them are kept.
    """

    def __init__(self, device: Device, count: int, folder: str) -> None:
        self.device, self.count = device, count
        self._shape = SHAPE.planes, 2 * count, SHAPE.tokens, SHAPE.channels
        strides = tuple(2 * int(np.prod(self._shape[at + 1 :])) for at in range(4))
        self._memory = device.allocate(2 * int(np.prod(self._shape)))
        spec = kvortex.TensorSpec(self._memory.address, self._shape, strides, 2, device.name, self)
        self.layout = kvortex.KVLayout.from_pointers(spec, 1, 0, device=device.name)
        self.source, self.target = np.random.default_rng(1).permutation(2 * count).reshape(2, count)
        self._drawn = realistic(min(count, DISTINCT)).view(np.uint16).reshape(-1, SHAPE.planes, *self._shape[2:])
        self._cleared = np.full(self._shape, 0xFFFF, np.uint16)
        for at, page in enumerate(self.source):
            self._cleared[:, page] = self._block(at)
        self.clear()
        self.tables, self.path = calibrate(self.records(np.arange(min(count, LEARNT))), SHAPE), Path(folder, "tables")
        self.tables.save(self.path, SHAPE)
        self.checked = np.unique(np.linspace(0, count - 1, CHECKED).astype(np.int64))

    def _block(self, at: int) -> npt.NDArray[np.uint16]:
        """One that was drawn, with signs and mantissas of its own."""
        other, block = divmod(at, len(self._drawn))
        return self._drawn[block] ^ np.uint16(other & 0x7F | (other << 8) & 0x8000)

    def records(self, blocks: Ids) -> Bytes:
        """(n, raw_bytes): what the pages of ``source`` hold."""
        return np.stack([self._block(int(at)).reshape(-1) for at in blocks]).view(np.uint8)

    def parts(self, codec: Codec) -> tuple[float, float]:
        """What a slot of a codec is of an original, and the mean of some blocks' records."""
        some = self.records(self.checked)
        used = np.abs(codec.encode_into(some, np.zeros((len(some), codec.slot_bytes), np.uint8))).mean()
        return codec.slot_bytes / SHAPE.raw_bytes, float(used) / SHAPE.raw_bytes

    def clear(self) -> None:
        """Ones in all bits of the pages of ``target``."""
        self._memory.write(self._cleared.reshape(-1).view(np.uint8))

    def wrong_bytes(self, wanted: Bytes | None) -> int:
        """Bytes of all pages that are not what they should be: in ``target`` what is in ``source``, or of the blocks
        ``checked`` what is ``wanted``."""
        data = self._memory.read().view(np.uint16).reshape(self._shape)
        some = {} if wanted is None else dict(zip(self.checked.tolist(), wanted.view(np.uint16), strict=True))

        def one(at: int) -> int:
            source, target, block = data[:, self.source[at]], data[:, self.target[at]], self._block(at)
            wrong = np.count_nonzero(source.view(np.uint8) != block.view(np.uint8))
            loaded = block if wanted is None else some.get(at)
            if loaded is not None:
                wrong += np.count_nonzero(target.view(np.uint8) != loaded.reshape(block.shape).view(np.uint8))
            return int(wrong)

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # NumPy holds no GIL in these loops
            return sum(pool.map(one, range(self.count)))

    def close(self) -> None:
        """Frees the pages."""
        self._memory.free()


class Coded:
    """An engine with a codec over the pages.

    Attributes
    ----------
    seconds : dict
        Of saves and loads that were kept, as the device's clock has them.
    """

    def __init__(self, engine: kvortex.KVortexEngine, pages: Pages, name: str, staging: int) -> None:
        self.engine, self.name, self.staging, self._pages = engine, name, staging, pages
        self.keys = np.random.default_rng(2).integers(0, 256, (pages.count, 32), np.uint8)
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self.nbytes = pages.count * SHAPE.raw_bytes

    def save(self) -> kvortex.Ticket:
        """Starts a save by keys that are new."""
        self.keys = self.keys.copy()  # a save before this one may be under way
        self.keys.view(np.int64)[:, 0] += 1
        return self.engine.save_blocks(self.keys, self._pages.source, first=False)

    def load(self) -> kvortex.Ticket:
        """Starts a load of what was saved last."""
        return self.engine.load_blocks(self.keys, self._pages.target, first=False)

    def turn(self, *, keep: bool) -> None:
        """A save and a load."""
        for way, start in zip(WAYS, (self.save, self.load), strict=True):
            ticket = moved(start())
            if keep:
                self.seconds[way].append(ticket.seconds)

    def rate(self, way: str, *, best: bool = False) -> float:
        """GB/s of original bytes, the median or the best."""
        return self.nbytes / (min if best else statistics.median)(self.seconds[way]) / 1e9

    def facts(self) -> dict[str, Any]:
        """What records are, and a last load that is checked, with the slots of some blocks."""
        codec, pages = self.engine.codec, self._pages
        pages.clear()
        moved(self.load())
        facts: dict[str, Any] = {"codec": self.name, "staging_mib": self.staging, "blocks": pages.count}
        if codec is None:
            return facts | {"ratio": 1.0, "slot": 1.0, "wrong_bytes": pages.wrong_bytes(None)}
        some = pages.records(pages.checked)
        coded, back = np.zeros((len(some), codec.slot_bytes), np.uint8), np.empty_like(some)
        codec.encode_into(some, coded)
        codec.decode_into(coded, back)
        used = float(coded[:, : HEADER.itemsize].view(HEADER)["used_bytes"].mean())
        wrong = pages.wrong_bytes(None if codec.exact else back) + self._wrong_slots(coded)
        return facts | {"ratio": SHAPE.raw_bytes / used, "slot": codec.slot_bytes / SHAPE.raw_bytes, "wrong_bytes": wrong}

    def _wrong_slots(self, coded: Bytes) -> int:
        """Bytes of slots that are not what the codec's own calls make of the blocks."""
        slots = self.engine._index.acquire(self.keys[self._pages.checked])
        try:
            views = (self.engine._parts.arena.view(int(slot)) for slot in slots)
            return sum(int((view[: len(own)] != own).sum()) for view, own in zip(views, coded, strict=True))
        finally:
            self.engine._index.release(slots)


def engines(
    pages: Pages, staging: int, notes: dict[str, Any], *, sets: int = 1, own: Own | None = None
) -> Iterator[Coded]:
    """One for each codec that has a way here, one after another; the others are told by the notes.

    Parameters
    ----------
    pages
    staging
        MiB of staging buffers; 0 for what the engine takes by itself.
    notes
    sets
        The pool holds as many times all blocks.
    own
        Gives options of a codec's engine, by the codec's name and :meth:`Pages.parts`.
    """
    for name in CODECS:
        codec = make_codec(name, SHAPE, pages.tables)
        slot = -(-codec.slot_bytes // 4096) * 4096
        given = {"codec": name, "gpu_pool_size_bytes": staging << 20 or None, "device": pages.device.name}
        given |= {"cpu_pool_size_bytes": sets * pages.count * slot, "codec_tables": str(pages.path)}
        if own is not None:
            given |= own(name, *pages.parts(codec))
        try:
            engine = kvortex.KVortexEngine.create(kvortex.KVortexConfig(**given), pages.layout)
        except ConfigError as error:
            notes.setdefault("left_out", {})[name] = str(error)
            continue
        engine.wait_ready()
        yield Coded(engine, pages, name, staging)
