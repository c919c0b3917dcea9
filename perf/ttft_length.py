"""Prompts of one length, in every way that ``perf ttft`` asks about."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kvortex
from examples.lm.pages import BLOCK_SIZE
from kvortex.codecs import CODECS, RecordShape, calibrate
from kvortex.devices import Device
from kvortex.errors import ArgumentError
from perf import jax_serving
from perf.jax_llama import Ids, JaxLlama
from perf.jax_pages import JaxPages
from perf.jax_serving import Answer, Other, Waits, whole
from perf.report import progress

PAIR_SECONDS, FEWEST_PAIRS, MOST_PAIRS = 12.0, 3, 25  # of a cold prompt and a saved one
HITS, DISK_HITS, BESIDE_COLD, QUICK = 9, 3, 3, 2
TIMEOUT_S = 300.0
LEARNT, HELD = 24, 4  # blocks that tables are made of, and that are held to a codec's own calls where it loses something
RAW = "raw"


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    device: str
    shape: str
    sizes: tuple[int, ...]
    attention: str
    other: int
    disk: Path | None
    seconds: float
    skip: frozenset[str]
    codecs: tuple[str, ...]
    tables: dict[str, str]
    engine: dict[str, str]  # variables, as of an environment
    quick: bool


class OneLength:
    """A length of prompt.

    Attributes
    ----------
    home, away
        Pages that prompts are computed in, and that hits are loaded into; drawn at random.
    """

    def __init__(self, jax: Any, device: Device, plan: Plan, model: JaxLlama, pages: JaxPages, waits: Waits, size: int) -> None:
        self._jax, self._device, self._plan, self._model = jax, device, plan, model
        self._pages, self._waits, self._size = pages, waits, size
        rng = np.random.default_rng(size)
        self._blocks = size // BLOCK_SIZE
        self._tokens: Ids = rng.integers(0, model.shape.vocabulary, size, np.int32)
        self.home, self.away = rng.permutation(pages.count).astype(np.int32)[: 2 * self._blocks].reshape(2, -1)
        self._wrong, self._same, self._hit_count = 0, True, QUICK if plan.quick else HITS
        self._right: Any = None  # scores
        self._codec, self._tables = RAW, plan.tables
        self._off_exact = 0.0

    def rows(self, torch_seconds: float | None) -> Iterator[dict[str, Any]]:
        """One for each codec: all columns but those of what was left out."""
        self._say("compiles")
        found: dict[str, Any] = {"tokens": self._size, "compile_s": self._compile()}
        found |= self._pairs()
        self._say("behind pages that never left VRAM")
        computed = self._cold().logits  # from here on what is in ``home`` stays as it is, but for the last block
        residents = [self._resident() for _ in range(self._hit_count)]
        self._right = residents[-1].logits
        if not np.isfinite(self._right).all():  # all NaN have the same bits
            raise ArgumentError(f"the model's scores behind {self._size} tokens are no numbers: nothing could be compared")
        found |= {"resident_ms": _ms(residents), "off_cold": _distance(self._right, computed)}
        found["resident_same_bits"] = int(all(_differing(answer.logits, self._right) == 0 for answer in residents))
        if torch_seconds is not None:
            found |= {"torch_ms": 1e3 * torch_seconds, "to_torch": found["cold_ms"] / (1e3 * torch_seconds)}
        found["teraflops"] = 1e-9 * self._model.flops(self._size) / found["cold_ms"]
        with tempfile.TemporaryDirectory() as folder:
            if not self._tables and set(self._plan.codecs) - {RAW}:
                self._tables = self._learnt(Path(folder, "own.tables"))
            for codec in self._plan.codecs:
                self._codec = codec
                yield found | {"codec": codec} | self._cached(found["cold_ms"])
                self._wrong, self._same, self._off_exact = 0, True, 0.0

    def _learnt(self, path: Path) -> dict[str, str]:
        """Tables of some blocks of the prompt, from its beginning to its end."""
        self._say("learns tables")
        shape = RecordShape(len(self._pages.layers), self._model.shape.kv_heads, self._model.shape.head_dim, BLOCK_SIZE)
        some = self.home[np.unique(np.linspace(0, self._blocks - 1, LEARNT).astype(np.int64))]
        calibrate(self._pages.records(some), shape).save(path, shape)
        return {"codec_tables": str(path)}

    def _cached(self, cold_ms: float) -> dict[str, Any]:
        """Hits of every kind, by one codec."""
        found = self._from_ram()
        if "beside" not in self._plan.skip:
            found |= self._beside()
        if "disk" not in self._plan.skip:
            found |= self._from_disk()
        ratios = {"speedup": "hit_ms", "disk_speedup": "disk_ms"}
        found |= {name: cold_ms / found[of] for name, of in ratios.items() if of in found}
        if not CODECS[self._codec].exact:
            found |= {"same_bits": "with loss", "off_exact": self._off_exact}
            return found | {"wrong_bytes": self._wrong}
        return found | {"same_bits": int(self._same), "wrong_bytes": self._wrong}

    def _say(self, what: str) -> None:
        progress(f"{self._size} tokens: {what}")

    def _cold(self, table: Ids | None = None) -> Answer:
        return jax_serving.cold(self._model, self._pages, self._waits, self._tokens, self.home if table is None else table)

    def _resident(self) -> Answer:
        return jax_serving.cold(self._model, self._pages, self._waits, self._tokens[-BLOCK_SIZE:], self.home)

    def _compile(self) -> float:
        began = time.perf_counter()
        self._cold(), self._resident(), self._cold(), self._resident()
        return time.perf_counter() - began

    @contextlib.contextmanager
    def _engine(self, **options: Any) -> Iterator[kvortex.KVortexEngine]:
        """With room for the prompt, and a quarter more for what tiers have in hand."""
        layout = self._pages.layout
        slot_bytes = -(-layout.record_bytes // 4096) * 4096
        options = {"cpu_pool_size_bytes": (self._blocks * 5 // 4 + 32) * slot_bytes, "device": self._device.name} | options
        options |= {"block_size": BLOCK_SIZE, "model": self._plan.shape, "dtype": "bfloat16", "transfer_timeout_s": TIMEOUT_S}
        options |= {} if self._codec == RAW else {"codec": self._codec} | self._tables
        with kvortex.KVortexEngine.create(kvortex.KVortexConfig.from_env(self._plan.engine, **options), layout) as engine:
            engine.wait_ready()
            yield engine

    def _pairs(self) -> dict[str, Any]:
        """A prompt computed, and one computed and saved, by turns."""
        colds: list[Answer] = []
        saved: list[Answer] = []
        with self._engine(beside_compute=True) as engine:
            keys = engine.block_keys(self._tokens)

            def cold() -> None:
                colds.append(self._cold())

            def saving() -> None:
                engine.drop_blocks(keys)
                request = self._pages, engine, self._waits, self._tokens, self.home
                saved.append(jax_serving.saving(self._model, *request))

            cold(), saving()
            count = int(min(MOST_PAIRS, max(FEWEST_PAIRS, PAIR_SECONDS / (colds[0].seconds + saved[0].seconds))))
            count = QUICK if self._plan.quick else count
            self._say(f"{count} pairs, saved and not")
            colds.clear(), saved.clear()
            for turn in range(count):
                for way in (cold, saving) if turn % 2 else (saving, cold):
                    way()
            ratios = [mine.seconds / theirs.seconds for mine, theirs in zip(saved, colds, strict=True)]
            found = {"cold_ms": _ms(colds), "saving_ms": _ms(saved), "saving_ratio": statistics.median(ratios)}
            found |= {"saving_ratios": [round(ratio, 5) for ratio in sorted(ratios)], "pairs": count}
            found["saved_ms"] = 1e3 * statistics.median(answer.saved_seconds for answer in saved)
            saving()  # the last one may have been the one that was not
            found["saving_same_bits"] = int(not _differing(saved[-1].logits, colds[-1].logits))
            self._look_at_saved(engine, keys)
        return found

    def _look_at_saved(self, engine: kvortex.KVortexEngine, keys: Any) -> None:
        """Whether what was saved behind the layers is what is in the pages."""
        self._pages.spoil(self.away)
        whole(engine.load_blocks(keys, self.away, stream=self._waits.stream), len(keys), moves=True)
        self._wrong += self._pages.wrong_bytes(self.away, self.home)

    def _from_ram(self) -> dict[str, Any]:
        with self._engine(beside_compute=False) as engine:
            self._save(engine)
            return {"hit_ms": _ms(self._hits(engine, "from RAM", self._hit_count))}

    def _beside(self) -> dict[str, Any]:
        """While another prompt is prefilled, on pages of its own."""
        blocks, rng = self._plan.other // BLOCK_SIZE, np.random.default_rng(1)
        pages = JaxPages(self._jax, self._model.shape, 2 * blocks, self._device.name)
        tokens = rng.integers(0, self._model.shape.vocabulary, self._plan.other, np.int32)
        table = np.arange(blocks, dtype=np.int32)
        jax_serving.cold(self._model, pages, self._waits, tokens, table)  # compiled now, and not beside the hit
        with self._engine(beside_compute=True) as engine:
            self._save(engine)
            with Other(self._model, pages, tokens, table) as other:
                self._say("whole, beside another prefill")
                colds = [self._cold(self.away) for _ in range(1 if self._plan.quick else BESIDE_COLD)]
                before = other.layers
                hits = self._hits(engine, "from RAM, beside another prefill", self._hit_count, layerwise=False)
                ran = other.layers - before
        pages.layers.clear()
        found = {"beside_cold_ms": _ms(colds), "beside_hit_ms": _ms(hits), "beside_layers": ran}
        return found | {"beside_speedup": found["beside_cold_ms"] / found["beside_hit_ms"]}

    def _from_disk(self) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(prefix="kvortex-ttft-", dir=self._plan.disk))
        capacity = (self._blocks * 5 // 4 + 64) * (self._pages.layout.record_bytes + 65536)
        tiers = (f"disk:{folder}?capacity={capacity}",)
        try:
            with self._engine(tiers=tiers) as engine:
                self._say("writes to disk")
                self._save(engine)
                began = time.perf_counter()
                if not engine.flush(TIMEOUT_S):
                    raise kvortex.TransferError(f"the disk tier was not written after {TIMEOUT_S} s")
                flushed = time.perf_counter() - began
            answers = []
            for _ in range(1 if self._plan.quick else DISK_HITS):
                with self._engine(tiers=tiers) as engine:  # whose RAM is empty
                    answers += self._hits(engine, "from disk", 1)
        finally:
            shutil.rmtree(folder)
        return {"disk_ms": _ms(answers), "disk_flush_s": flushed}

    def _save(self, engine: kvortex.KVortexEngine) -> None:
        """All blocks but the last, from where they were computed."""
        keys = engine.block_keys(self._tokens)[:-1]
        self._pages.check()
        save = engine.save_blocks(keys, self.home[:-1], stream=self._waits.stream, first=True)
        whole(save, len(keys), moves=True)

    def _hits(self, engine: kvortex.KVortexEngine, where: str, count: int, *, layerwise: bool = True) -> Sequence[Answer]:
        self._say(f"{count} hits {where}")
        answers = []
        for _ in range(count + (count > 1)):  # one to warm up, but not of engines that are made for one hit
            self._pages.spoil(self.away)
            request = self._pages, engine, self._waits, self._tokens, self.away
            answers.append(jax_serving.hit(self._model, *request, layerwise=layerwise))
            self._look_at_hit(engine, answers[-1])
        return answers[-count:]

    def _look_at_hit(self, engine: kvortex.KVortexEngine, answer: Answer) -> None:
        """Whether pages are what was saved, and scores those of a prompt that never left; or, of a codec with loss, whether
        some blocks are what its own calls make of them, and how far off the scores are."""
        codec = engine.codec
        if codec is None or codec.exact:
            differing = _differing(answer.logits, self._right)
            self._wrong, self._same = self._wrong + differing, self._same and not differing
            self._wrong += self._pages.wrong_bytes(self.away[:-1], self.home[:-1])
            return
        some = np.unique(np.linspace(0, self._blocks - 2, HELD).astype(np.int64))
        wanted = self._pages.records(self.home[some])
        others, coded = wanted[1:].copy(), np.zeros((len(some) - 1, codec.slot_bytes), np.uint8)
        codec.encode_into(others, coded)
        codec.decode_into(coded, others)
        wanted[1:] = others  # the first one comes back exactly
        self._wrong += int((self._pages.records(self.away[some]) != wanted).sum())
        self._off_exact = float(np.maximum(self._off_exact, _distance(answer.logits, self._right)))  # NaN too


def _ms(answers: Sequence[Answer]) -> float:
    return 1e3 * statistics.median(answer.seconds for answer in answers)


def _distance(mine: Any, right: Any) -> float:
    return float(np.linalg.norm(mine - right) / np.linalg.norm(right))


def _differing(mine: Any, right: Any) -> int:
    """Bytes."""
    return int((mine.view(np.uint8) != right.view(np.uint8)).sum())
