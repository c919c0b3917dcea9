"""Plans of coded loads in groups of layers: each byte crosses, is digested once, and is decoded when it is there."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvortex.codecs import make_codec
from kvortex.codecs.base import HEADER
from kvortex.codecs.lossy import LossyCodec
from kvortex.codecs.plane import PlaneCodec
from kvortex.devices.cuda import CudaDevice
from kvortex.kernels.plane_form import FIXED_BYTES
from kvortex.transfer.coded import _lookups, _strips
from kvortex.transfer.coded.coders import slots_as_words
from kvortex.transfer.coded.layers import LayeredCoder, coded_group_count, group_edges
from kvortex.transfer.executor import Direction, poll
from kvortex.transfer.layers import Least
from kvortex.transfer.plan import (
    ARGUMENTS,
    COPY_BYTES,
    DEVICE_SIDE,
    FIRST_BLOCK,
    FIRST_COPY,
    FIRST_LAUNCH,
    HOST_PITCH,
    HOST_SIDE,
    KERNEL,
    LINES,
    N_BLOCKS,
    N_COPIES,
    N_LAUNCHES,
    PITCH,
    Pool,
)
from tests.engine.coded import slot_of
from tests.fake_gpu import fake_gpu
from tests.naive_coded_layers import NaiveLoad, naive_offsets
from tests.transfer.coded_slots import Filled, deep
from tests.transfer.profiles import H100, shape

CHEAP = Least(1, 1, 1)
COUNT = 14
Offsets = npt.NDArray[np.int64]


def test_groups_are_as_many_as_hide_more_than_they_cost() -> None:
    """Of Llama-3-8B's shape, 1.4 MiB a record, with the figures of a PCIe 5 link; the more the longer a load is, and one where
    blocks lie apart, since each is a copy then."""
    record, head = 1_482_752, 4160
    found = [coded_group_count(n * record, n, 1, 3, head, H100.least) for n in (1, 16, 64, 255, 1023, 2047)]
    assert found == [1, 1, 3, 4, 4, 4], found
    assert coded_group_count(2047 * record, 2047, 2047, 3, head, H100.least) == 1
    assert coded_group_count(2047 * 500_000, 2047, 40, 1, 0, H100.least) == 4
    assert coded_group_count(10 * 4096, 10, 1, 1, 0, CHEAP) == 4


def test_the_first_and_the_last_group_are_half_as_long() -> None:
    assert group_edges(np.arange(33) * 4096, 4).tolist() == [0, 5, 16, 27, 32]
    assert group_edges(np.arange(33) * 4096, 3).tolist() == [0, 8, 24, 32]
    assert group_edges(np.arange(33) * 4096, 2).tolist() == [0, 16, 32]
    assert group_edges(np.arange(33) * 4096, 1).tolist() == [0, 32]
    assert group_edges(np.arange(4) * 4096, 4).tolist() == [0, 1, 2, 3]
    assert group_edges(np.array([0, 4096]), 4).tolist() == [0, 1]


def test_where_tails_begin_is_what_tables_say_and_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    with fake_gpu(monkeypatch):
        coded = deep(tmp_path)
        with coded.engine("plane") as engine:
            filled = Filled.make(coded, engine, COUNT, 1)
            codec, coder = engine.codec, coder_of(engine)
            assert isinstance(codec, PlaneCodec)
            wild = [0xFFFFFFFF, int(rng.integers(0, 1 << 32)), 1024 | 1024 << 16, 5 | 6 << 16, 1025]
            for at, slot in enumerate(filled.slots.tolist()):  # one of them, or all
                entries = slot_of(engine, slot)[64 : 64 + 4 * codec.tiles].view(np.uint32)
                mine = wild[at : at + 1] or wild
                entries[rng.choice(codec.tiles - 4, len(mine), replace=False)] = mine
            slots = np.sort(filled.slots)
            slot_of(engine, int(slots[-1]))[64 : 64 + 4 * codec.tiles] = 0xFF  # longer than any slot
            for slot, used in zip(slots[:4].tolist(), (0, 64, 1 << 31, 1 << 40), strict=True):
                slot_of(engine, slot)[:64].view(HEADER)["used_bytes"] = used
            for edges in ([0, 4, 5, 20, codec.tiles], [0, 4, 14, codec.tiles], [0, codec.tiles], [0, 4, 5, 20]):
                found = coder._look(slots, np.array(edges), None)
                for row, slot in zip(found.tolist(), slots.tolist(), strict=True):
                    assert row == naive_offsets(codec, slot_of(engine, slot), edges, 20 in edges[:-1] and edges[-1] > 20)
                if len(edges) > 2:
                    assert (coder._look(slots, np.array(edges[1:]), found[:, 1]) == found[:, 1:]).all()


def test_slots_are_seen_as_words() -> None:
    memory = np.arange(4 * 256, dtype=np.uint32)
    words = slots_as_words(Pool(memory.ctypes.data, 1024, 4), 3)
    assert (words == memory[:768]).all() and not words.flags.writeable and words.flags.c_contiguous
    _lookups.load_compiled()


def coder_of(engine: Any) -> LayeredCoder:
    coder: LayeredCoder = engine._executor._coder
    return coder


class Followed:
    """A plan, chunk by chunk: what lies where in staging, and how often each byte of each record was digested."""

    def __init__(self, filled: Filled, plan: Any) -> None:
        self.filled, self.plan, self.engine = filled, plan, filled.engine
        self.coder, codec = coder_of(filled.engine), filled.engine.codec
        assert codec is not None
        self.codec: Any = codec
        self.names = {handle: name for name, handle in self.coder._kernels.items()}
        self.slots = filled.slots[plan.order]
        self.parts = np.full(len(self.slots), -1) if filled.parts is None else filled.parts[plan.order]
        self.digested = np.zeros((len(self.slots), codec.slot_bytes), np.int64)
        self.decoded = np.zeros((len(self.slots), self.coder.tiles), np.int64)

    def header(self, record: int) -> Any:
        return slot_of(self.engine, int(self.slots[record]))[:64].view(HEADER)[0]

    def chunk(self, chunk: Offsets) -> None:
        pool, first, count = self.coder._pool, int(chunk[FIRST_BLOCK]), int(chunk[N_BLOCKS])
        staging = np.full((self.coder._buffer_bytes, 2), -1, np.int64)  # record and byte of it
        for copy in self.plan.copies[chunk[FIRST_COPY] : chunk[FIRST_COPY] + chunk[N_COPIES]].tolist():
            for line in range(copy[LINES]):
                slot, at = divmod(copy[HOST_SIDE] + line * copy[HOST_PITCH] - pool.address, pool.slot_bytes)
                (record,) = np.flatnonzero(self.slots == slot)
                where = staging[copy[DEVICE_SIDE] + line * copy[PITCH] :][: copy[COPY_BYTES]]
                assert len(where) == copy[COPY_BYTES] and (where == -1).all(), "strips lie side by side, within a buffer"
                where[:, 0], where[:, 1] = record, at + np.arange(copy[COPY_BYTES])
                assert at + copy[COPY_BYTES] <= self.codec.slot_bytes
        launches = self.plan.launches[chunk[FIRST_LAUNCH] : chunk[FIRST_LAUNCH] + chunk[N_LAUNCHES]]
        for launch in launches.tolist():
            name, arguments = self.names[launch[KERNEL]], launch[ARGUMENTS:]
            (self._read if name == "read_records" else self._decode)(staging, first, count, arguments)

    def _there(self, staging: Offsets, record: int, at: int, begin: int, end: int) -> None:
        """That bytes of a record lie at ``at`` in staging."""
        assert at >= 0
        where = staging[at : at + end - begin]
        assert (where[:, 0] == record).all() and (where[:, 1] == np.arange(begin, end)).all()

    def _read(self, staging: Offsets, first: int, count: int, arguments: list[int]) -> None:
        _, pitch, n, _, sums, begin, end, shift, headed = arguments[:9]
        assert n == count and sums == 16 * first
        for k, record in enumerate(range(first, first + count)):
            last = min(end, int(self.header(record)["used_bytes"])) if headed else end
            if headed:
                self._there(staging, record, k * pitch, 0, 64)
            if begin < last:
                self._there(staging, record, k * pitch + begin - shift, begin, last)
                self.digested[record, begin:last] += 1

    def _decode(self, staging: Offsets, first: int, count: int, arguments: list[int]) -> None:
        _, pitch, _, status, ids, n, run, begin, end, tails_from = arguments[:10]
        assert n == count and status == 4 * first and run > 0 and ids == first * (4 if self.codec.name == "plane" else 8)
        for k, record in enumerate(range(first, first + count)):
            self.decoded[record, begin:end] += 1
            for offset, ranges in self._ranges(record, begin, end, pitch, tails_from):
                self._there(staging, record, k * pitch + offset, *ranges)
                assert (self.digested[record, slice(*ranges)] > 0).all(), "what is decoded is digested by now"

    def _ranges(self, record: int, begin: int, end: int, pitch: int, tails_from: int) -> Any:
        """Where a decoder reads, and which bytes of the record these are to be."""
        codec, used = self.codec, int(self.header(record)["used_bytes"])
        if self.parts[record] >= 0:
            assert (begin, end) == (0, self.coder.tiles)
            yield 0, (0, used)
        elif isinstance(codec, LossyCodec):
            each = self.coder.tiles // codec.shape.planes
            sizes = [codec.key_bytes if part == "K" else codec.value_bytes for part in codec.shape.parts_of_planes]
            low, high = (64 + sum(sizes[: tile // each]) for tile in (begin, end))
            yield 0, (low if begin else 0, high)
        else:
            head = codec.fixed_bytes - FIXED_BYTES * codec.tiles
            yield 0, (0, head)
            yield head, (head + FIXED_BYTES * begin, head + FIXED_BYTES * end)
            low, high = naive_offsets(codec, slot_of(self.engine, int(self.slots[record])), [begin, end])
            own = head + FIXED_BYTES * (end - begin)
            assert 0 <= low - tails_from and own + high - tails_from <= pitch
            yield own + low - tails_from, (low, high)


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("codec", ["plane", "int8", "k4v3"])
def test_each_byte_crosses_and_is_digested_once_before_it_is_decoded(
    codec: str, busy: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch):
        coded = deep(tmp_path, device=CudaDevice())
        room = -(-make_codec(codec, coded.shape, coded.tables).slot_bytes // 4096) * 4096
        for seed, each in enumerate((1, 2, 5)):
            with coded.engine(codec, slots=64, gpu_pool_size_bytes=8 * each * room) as engine:
                filled = Filled.make(coded, engine, COUNT, seed, firsts=2)
                offsets = coded.cache.layout.layer_offsets
                layered = coder_of(engine).layered(filled.blocks, filled.slots, busy, filled.parts, offsets, CHEAP)
                assert layered is not None and layered.group_of.tolist() == [0, 1, 1, 2, 2, 3]
                plan = layered.whole()
                assert plan.nbytes == int((plan.copies[:, COPY_BYTES] * plan.copies[:, LINES]).sum())
                followed = Followed(filled, plan)
                assert len(plan.marks) == 4 and plan.marks[-1] == len(plan.chunks) >= 4
                edges, at = np.searchsorted(layered.group_of, [0, 1, 2, 3, 4]) * coder_of(engine).tiles // 6, 0
                for group, mark in enumerate(plan.marks.tolist()):
                    for chunk in plan.chunks[at:mark]:
                        followed.chunk(chunk)
                    at, kept = mark, followed.parts >= 0
                    assert (followed.decoded[:, : edges[group + 1]] == 1).all(), "a mark has its layers"
                    assert not followed.decoded[~kept, edges[group + 1] :].any(), "and no others before it"
                for record, counts in enumerate(followed.digested):
                    used = int(followed.header(record)["used_bytes"])
                    assert (counts[:used] == 1).all() and not counts[used:].any()
                again = layered.first(), layered.rest()
                assert [len(part.chunks) for part in again] == [plan.marks[0], len(plan.chunks) - plan.marks[0]]


@pytest.mark.parametrize("codec", ["plane", "int8", "k4v3"])
def test_plans_are_those_of_the_naive_planner(codec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Row by row, of random slots in registrations of several sizes, with buffers of a record and more, damage among them."""
    rng = np.random.default_rng(7)
    with fake_gpu(monkeypatch):
        coded = deep(tmp_path, device=CudaDevice())
        with coded.engine(codec, slots=64) as engine:
            coder, compared = coder_of(engine), 0
            for case in range(24):
                filled = Filled.make(coded, engine, int(rng.integers(2, COUNT + 1)), case, firsts=case % 3)
                if codec == "plane":
                    for slot in filled.slots[: case % 3].tolist():
                        slot_of(engine, slot)[64 : 64 + 4 * coder.tiles].view(np.uint32)[rng.integers(coder.tiles)] = 0xFFFF
                pool, each = coder._pool, float(rng.choice([1, 1.5, 3, 50]))
                changes = {
                    "_pool": replace(pool, segment_slots=int(rng.choice([1, 5, 64]))),
                    "_buffer_bytes": int(pool.slot_bytes * each),
                    "_per_chunk": int(each),
                    "_numbers": coder._numbers * (case % 4 > 0),
                    "most_ctas": (int(rng.integers(1, 40)), int(rng.integers(1, 9))),
                    "_cuts": {},
                }
                with monkeypatch.context() as patch:
                    for name, value in changes.items():
                        patch.setattr(coder, name, value)
                    compared += same_as_naive(coder, filled, busy=case % 5 == 0)
            assert compared == 24
    loaded = _lookups.tail_offsets, _strips.pitch_of_all, _strips.part_chunks, _strips.list_groups
    assert [len(function.signatures) for function in loaded] == [1] * 4, "all that is called was loaded before VRAM was taken"


def same_as_naive(coder: LayeredCoder, filled: Filled, *, busy: bool) -> bool:
    layer_offsets = filled.coded.cache.layout.layer_offsets
    load = coder.layered(filled.blocks, filled.slots, busy, filled.parts, layer_offsets, CHEAP)
    assert load is not None
    parts = np.full(len(filled.slots), -1) if filled.parts is None else filled.parts
    order = sorted(range(len(parts)), key=lambda at: (parts[at] < 0, filled.slots[at]))
    slots = filled.slots[order].tolist()
    edges = [int(np.count_nonzero(load.group_of < group)) * coder.tiles // 6 for group in range(load.group_of.max() + 2)]
    records = [slot_of(filled.engine, slot) for slot in slots]
    naive = NaiveLoad(coder, records, slots, int((parts >= 0).sum()), edges, busy)
    for plan, wanted in ((load.first(), naive.first()), (load.rest(), naive.rest())):
        for name in ("chunks", "copies", "launches", "marks"):
            assert getattr(plan, name).tolist() == getattr(wanted, name), name
            assert getattr(plan, name).flags.c_contiguous and getattr(plan, name).dtype == np.int64
        assert plan.nbytes == sum(row[COPY_BYTES] * row[LINES] for row in wanted.copies) and plan.order.tolist() == order
    return True


def test_what_is_not_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Slots that hold no fixed parts, of which a strip would reach into the next one; layers that begin within planes."""
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch):
        coded = deep(tmp_path, device=CudaDevice())
        with coded.engine("plane", slots=64) as engine:
            coder, some = coder_of(engine), np.arange(COUNT)
            offsets = coded.cache.layout.layer_offsets
            how = some, some, False, None, offsets, CHEAP
            assert coder.layered(*how) is not None
            assert coder.layered(*how[:4], offsets + 16 * (np.arange(len(offsets)) == 2), CHEAP) is None
            small = PlaneCodec(coded.shape, coded.tables, budget=0.6)
            assert small.slot_bytes < small.fixed_bytes
            monkeypatch.setattr(coder, "codec", small)
            assert coder.layered(*how) is None


def test_one_wild_record_makes_no_other_wait_in_vain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An earlier chunk of more records got further than a later one of fewer has to go."""
    with fake_gpu(monkeypatch):
        coded = deep(tmp_path, device=CudaDevice())
        with coded.engine("plane", slots=64) as engine:
            coder, codec = coder_of(engine), engine.codec
            assert isinstance(codec, PlaneCodec)
            begin, most = codec.fixed_bytes, codec.slot_bytes
            cut = coder._cut(3, coded.cache.layout.layer_offsets)
            assert cut is not None and len(cut.edges) == 4
            offsets = np.array([[begin + 100, begin + 200, begin + 300], [begin + 900, begin + 1000, begin + 1100]])
            slots, starts, done = np.arange(2), np.arange(2), np.full(2, begin + 960)
            groups = cut.fixed[1:], offsets, done, begin, most, cut.rows[1:]
            listed = _strips.list_groups(slots, 0, starts, starts[-1:], *groups, (0, codec.slot_bytes, 64), 8, 16)
            tails = listed[2].reshape(2, 2, 3, -1)[:, :, 1, ARGUMENTS + 5 : ARGUMENTS + 7]  # digested
            assert (tails[0, :, 0] == done).all() and (tails[1, :, 0] == tails[0, :, 1]).all()
            assert (np.diff(tails) >= 0).all() and (tails <= most).all() and (listed[4] == tails[1, :, 1]).all()
            assert tails[0, 0].tolist() == [begin + 960] * 2 and tails[1, 1, 1] > begin + 1000


DAMAGE = ("magic", "stored", "used", "shorter", "digest", "entry", "other entry", "every entry", "fixed", "tail", "verbatim")


def hurt(codec: Any, slot: npt.NDArray[np.uint8], what: str, layer: int) -> None:
    """One of several things that may happen to a coded record; those of bodies in a layer."""
    used, header = int(slot[:64].view(HEADER)[0]["used_bytes"]), slot[:64].view(HEADER)
    tile = layer * codec.tiles // 6
    if what in ("magic", "digest"):
        slot[0 if what == "magic" else 40] ^= 1
    elif what == "stored":
        slot[8] ^= 2
    elif what == "verbatim":
        slot[8] = 1
    elif what == "used":
        slot[25] ^= 1
    elif what == "shorter":
        header["used_bytes"] = used - 4
    elif not isinstance(codec, PlaneCodec):
        slot[64 + layer * (codec.slot_bytes - 64) // 6 + 5] ^= 4
    elif what == "every entry":
        slot[64 : 64 + 4 * codec.tiles] = 0xFF
    elif "entry" in what:
        slot[64 + 4 * tile :][:4].view(np.uint32)[0] = 1024 | 700 << 16 if what == "entry" else 0xFFFFFFFF
    elif what == "fixed":
        slot[codec.fixed_bytes - FIXED_BYTES * (codec.tiles - tile) + 300] ^= 0x10
    else:
        slot[naive_offsets(codec, slot, [tile])[0]] ^= 1


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("codec", ["plane", "k4v3"])
def test_damage_anywhere_is_that_block_s_alone(
    codec: str, digests: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Told by digests, or by the kernels where these are led by it, whichever group finds it; and nothing is led astray."""
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch) as gpu:
        coded = deep(tmp_path, device=CudaDevice())
        with coded.engine(codec, slots=64, digests=digests) as engine:
            for turn, (what, layer) in enumerate([(what, layer) for what in DAMAGE for layer in (0, 2, 5)]):
                filled = Filled.make(coded, engine, 7, turn % 3, firsts=1)
                before = whole(filled)
                bad = int(np.flatnonzero(filled.parts == -1)[2]) if filled.parts is not None else 3
                hurt(engine.codec, slot_of(engine, int(filled.slots[bad])), what, layer)
                filled.spoil()
                load = filled.load(None)
                assert poll(load.query, time.monotonic() + 10) and load.error is None
                led = what not in ("fixed", "tail") and (codec == "plane" or "entry" not in what)
                unfit = np.zeros(len(filled.slots), np.bool_) if load.unfit is None else load.unfit
                assert not np.delete(unfit, bad).any() and (not led or unfit[bad]), (what, layer)
                if digests:
                    wrong = (load.digests != before).any(axis=1)
                    assert wrong[bad] and not np.delete(wrong, bad).any(), (what, layer)
                good = [at for at in range(7) if filled.pages[at] != filled.blocks[bad]]
                assert all(filled.right(gpu, 6, at) for at in good), (what, layer)


def whole(filled: Filled) -> Any:
    """Digests of what lies there, by a load of whole records."""
    load = filled.load(None, layerwise=False)
    assert poll(load.query, time.monotonic() + 10) and load.error is None and load.unfit is None
    return load.digests


def test_a_slot_that_changes_while_it_is_read_leads_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory that is damaged between planning and copying: kernels compare what a record says with what lies there."""
    shape(monkeypatch, line_bytes=1, copy_bytes=1, group_bytes=1)
    with fake_gpu(monkeypatch) as gpu:
        coded = deep(tmp_path, device=CudaDevice())
        with coded.engine("plane", slots=64, digests=False) as engine:
            filled = Filled.make(coded, engine, 7, 1)
            executor: Any = engine._executor
            load = executor.prepare_blocks(Direction.LOAD, filled.blocks, filled.slots, None, True, None)
            slot = slot_of(engine, int(filled.slots[3]))
            entries = slot[64 : 64 + 4 * coder_of(engine).tiles].view(np.uint32)
            entries[:4], entries[-4:] = entries[:4] + 64, entries[-4:] - np.minimum(entries[-4:] & 0xFFFF, 64)
            load.start()
            assert poll(load.query, time.monotonic() + 10) and load.unfit is not None and load.unfit[3]
            assert load.unfit.sum() == 1 and not gpu.wild


