"""Engines whose slots hold coded records: what comes back, what does not fit, and what was damaged."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvortex.codecs import make_codec
from kvortex.codecs.base import HEADER
from kvortex.devices import Device, HostStream
from kvortex.digests import digest_records
from kvortex.errors import ConfigError, CorruptBlocksError, LayersMissingError
from kvortex.transfer.executor import Direction, poll
from tests.engine.coded import BLOCKS, CODED, EACH, EACH_GPU, WHERE, Coded, caches, slot_of, slot_of_page, slots_of
from tests.engine.tiered import nothing_is_held
from tests.naive_digest import digest
from tests.pages import Bytes, assert_same, keys_of
from tests.transfer.submitting import submit_blocks

NOISE = np.random.default_rng(11)


each = pytest.mark.parametrize(("codec", "where"), EACH, indirect=["where"])
everywhere = pytest.mark.parametrize("where", WHERE, indirect=True)


def unfit(codec: str, coded: Coded) -> Bytes:
    """A record that no slot holds: noise where nothing may be lost, an infinity where there are scales."""
    if codec == "plane":
        return NOISE.integers(0, 256, coded.shape.raw_bytes, np.uint8)
    record = coded.records[0].copy()
    record.view(np.uint16)[77] = 0x7F80
    return record


@pytest.mark.parametrize("kind", caches())
@pytest.mark.parametrize(("codec", "where"), [("plane", "host"), ("k4v4", "host"), *EACH_GPU], indirect=["where"])
def test_pages_of_every_kind(codec: str, where: Device, kind: str, tmp_path: Path) -> None:
    coded = Coded.make(tmp_path, kind, device=where)
    if where.name != "host" and kind == "padded":
        aligned = 4 if codec == "plane" else 16
        with pytest.raises(ConfigError, match=f"codec = '{codec}': not on a GPU: .*multiples of {aligned} bytes"):
            coded.engine(codec)
        return
    with coded.engine(codec) as engine:
        keys = engine.block_keys(np.arange(16 * 6))
        assert engine.save_blocks(keys, np.arange(6), first=True).wait().all()
        before = coded.cache.memory()
        ticket = engine.load_blocks(keys, np.arange(6, 12), first=True)
        assert ticket.wait().all()
        assert ticket.nbytes == 6 * coded.shape.raw_bytes
        back = [coded.read(block) for block in range(12)]
        for at in range(6):
            assert (back[at] == coded.records[at]).all()
            assert (back[6 + at] == coded.expected(codec, coded.records[at], first=at == 0)).all()
        for at in range(6, 12):  # and no byte beside the pages was touched
            coded.write(at, coded.records[at])
        assert_same(coded.cache.memory(), before)
        nothing_is_held(engine)


@each
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), data=st.data())
def test_any_blocks_in_any_order(codec: str, where: Device, seed: int, data: st.DataObject, tmp_path: Path) -> None:
    coded = Coded.make(tmp_path, seed=seed, device=where)
    first = np.array(data.draw(st.lists(st.booleans(), min_size=BLOCKS // 2, max_size=BLOCKS // 2)))
    order = np.array(data.draw(st.permutations(range(BLOCKS // 2))))
    with coded.engine(codec, num_transfer_streams=data.draw(st.integers(1, 3)), digests=data.draw(st.booleans())) as engine:
        keys = keys_of(*range(BLOCKS // 2))
        assert engine.save_blocks(keys, order, first=first).wait().all()
        assert engine.load_blocks(keys[::-1], np.arange(BLOCKS // 2, BLOCKS), first=first[::-1]).wait().all()
        for at in range(BLOCKS // 2):
            wanted = coded.expected(codec, coded.records[order[at]], bool(first[at]))
            assert (coded.read(BLOCKS - 1 - at) == wanted).all()


@each
def test_what_lies_in_slots(codec: str, coded: Coded) -> None:
    """Records of the codec, byte for byte, with zeros behind them, and digests of just that."""
    with coded.engine(codec) as engine:
        made = make_codec(codec, coded.shape, coded.tables)
        keys = keys_of(*range(4))
        assert engine.save_blocks(keys, [3, 2, 1, 0], first=False).wait().all()
        kept = engine._parts.digests
        assert kept is not None and engine.codec is not None and engine.codec.digest == made.digest
        for at, slot in enumerate(slots_of(engine, keys)):
            record = slot_of(engine, slot)[: made.slot_bytes].tobytes()
            alone = made.encode(coded.records[3 - at])
            assert record == alone.ljust(made.slot_bytes, b"\0")
            assert kept[slot].tobytes() == digest(record)


def test_a_pool_holds_more_blocks(tmp_path: Path) -> None:
    coded = Coded.make(tmp_path)
    held = {}
    for codec in ("raw", *CODED):
        with coded.engine(codec, slots=64) as engine:
            held[codec] = engine.get_stats().capacity_blocks
    assert coded.shape.raw_bytes == 6 * 4096  # and slots are multiples of 4 KiB
    assert held == {"raw": 64, "plane": 64 * 6 // 5, "int8": 96, "k6v4": 128, "k4v4": 192, "k4v3": 192}


@pytest.mark.parametrize("digests", [True, False])
@each
def test_what_does_not_fit_is_declined(codec: str, digests: bool, coded: Coded) -> None:
    coded.write(2, unfit(codec, coded))
    with coded.engine(codec, digests=digests) as engine:
        keys = keys_of(*range(5))
        ticket = engine.save_blocks(keys, np.arange(5), first=False)
        assert ticket.wait().tolist() == [True, True, False, True, True]
        assert ticket.error is None
        assert engine.check_blocks(keys, first=False).tolist() == [True, True, False, True, True]
        stats = engine.get_stats()
        assert (stats.overlong_blocks, stats.saved_blocks, stats.resident_blocks) == (1, 4, 4)
        assert stats.saved_bytes == 4 * coded.shape.raw_bytes
        nothing_is_held(engine)
        loaded = engine.load_blocks(keys, np.arange(5, 10), first=False)
        assert loaded.wait().tolist() == [True, True, False, True, True]
        assert (coded.read(8) == coded.expected(codec, coded.records[3])).all()
        only = engine.save_blocks(keys_of(9), [2], first=False)  # where nothing is left to be saved
        assert only.wait().tolist() == [False] and only.error is None and engine.get_stats().overlong_blocks == 2


def test_who_waits_for_a_save_hears_what_was_declined(coded: Coded) -> None:
    coded.write(1, unfit("plane", coded))
    go = threading.Event()
    with coded.engine("plane") as engine:
        stream = HostStream()
        stream.enqueue(lambda: go.wait(60))
        keys = keys_of(0, 1, 2)
        save = engine.save_blocks(keys, [0, 1, 2], stream=stream)
        other = engine.save_blocks(keys[::-1], [5, 4, 3])
        assert not other.done()
        go.set()
        assert other.wait().tolist() == [True, False, True]
        assert save.wait().tolist() == [True, False, True]
        nothing_is_held(engine)
        stream.close()


@everywhere
def test_a_late_settlement_leaves_slots_of_others_alone(coded: Coded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between giving back what was declined and making the rest visible, others take the slot, and a second thread settles."""
    coded.write(1, unfit("plane", coded))
    with coded.engine("plane") as engine:
        kept, index, commit = engine._parts.digests, engine._index, engine._index.commit
        assert kept is not None
        others: list[int] = []

        def between(slots: Any, **how: Any) -> bool:
            if not others:
                others.extend(index.reserve(keys_of(5), engine._parts.record_bytes).slots.tolist())
                kept[others] = 7
                commit(np.array(others))
                assert engine._flight._end(ticket._transfer)
            return commit(slots, **how)

        monkeypatch.setattr(index, "commit", between)
        ticket = engine.save_blocks(keys_of(0, 1), [0, 1])
        assert ticket.wait().tolist() == [True, False]
        assert others == [int(ticket._transfer.slots[1])]
        assert (kept[others] == 7).all() and engine.check_blocks(keys_of(0, 1, 5)).tolist() == [True, False, True]
        assert engine.get_stats().overlong_blocks == 1 and engine.get_stats().saved_blocks == 1
        assert engine.load_blocks(keys_of(0), [7]).wait().all()
        nothing_is_held(engine)


@each
def test_damage_in_a_slot_is_seen(codec: str, where: Device, coded: Coded) -> None:
    """On a GPU the zeros behind a record do not cross the link, so that is no damage to what is loaded."""
    rng, seen = np.random.default_rng(2), 0
    with coded.engine(codec) as engine:
        keys = keys_of(*range(6))
        for _ in range(12):
            assert engine.save_blocks(keys, np.arange(6), first=False).wait().all()
            hurt = int(rng.integers(6))
            slot = slot_of(engine, slots_of(engine, keys)[hurt])
            used, at = int(slot[: HEADER.itemsize].view(HEADER)[0]["used_bytes"]), int(rng.integers(engine._parts.record_bytes))
            slot[at] ^= 1 << int(rng.integers(8))
            ticket = engine.load_blocks(keys, np.arange(6, 12), first=False)
            if where.name != "host" and at >= used:
                assert ticket.wait().all() and (coded.read(6 + hurt) == coded.records[hurt]).all()
                continue
            seen += 1
            assert ticket.wait().tolist() == [at != hurt for at in range(6)]
            assert isinstance(ticket.error, CorruptBlocksError) and ticket.error.blocks == 1
            assert engine.check_blocks(keys, first=False).tolist() == [at != hurt for at in range(6)]
        assert engine.get_stats().corrupt_blocks == seen > 9
        nothing_is_held(engine)


@pytest.mark.parametrize("digests", [True, False])
@each
def test_a_record_of_another_codec_is_a_miss(codec: str, digests: bool, coded: Coded, tmp_path: Path) -> None:
    """With the right digest, as no damage has it: what says so is the codec's own header."""
    other = Coded.make(tmp_path, seed=77)
    foreign = make_codec(codec, coded.shape, other.tables)  # other tables
    short = foreign.encode(coded.records[0])
    with coded.engine(codec, digests=digests) as engine:
        assert engine.codec is not None
        mine = bytearray(engine.codec.encode(coded.records[0]).ljust(engine.codec.slot_bytes, b"\0"))
        mine[12:16] = b"\1\0\0\0"  # a part, or nothing that there is
        cut = bytes(mine[:64]).ljust(len(mine), b"\xff")
        for record in (short.ljust(foreign.slot_bytes, b"\0"), bytes(mine), bytes(len(mine)), cut):
            assert engine.save_blocks(keys_of(1), [1], first=False).wait().all()
            (slot,) = slots_of(engine, keys_of(1))
            there = slot_of(engine, slot)
            there[: len(record)] = np.frombuffer(record, np.uint8)
            if engine._parts.digests is not None:
                found = np.empty((1, 16), np.uint8)
                digest_records(np.array([there.ctypes.data]), np.array([engine.codec.slot_bytes]), found)
                engine._parts.digests[slot] = found[0]
            ticket = engine.load_blocks(keys_of(1), [7], first=False)
            assert not ticket.wait().any(), record[:64]
            assert "no records of the codec" in str(ticket.error)
            assert (coded.read(7) == coded.records[7]).all()  # untouched
            assert not engine.check_blocks(keys_of(1), first=False).any()


@each
def test_layer_by_layer(codec: str, coded: Coded) -> None:
    """A save is whole when its last layer is announced; a load gives all layers at once."""
    with coded.engine(codec) as engine:
        keys = keys_of(*range(4))
        save = engine.save_blocks(keys, np.arange(4), layerwise=True, first=True)
        for layer in (2, 0):
            save.save_layer(layer)
        with pytest.raises(LayersMissingError):
            save.wait()
        assert not engine.check_blocks(keys, first=True).any()
        save.save_layer(1)
        save.wait_layer(0)
        assert save.wait().all()
        load = engine.load_blocks(keys, np.arange(6, 10), layerwise=True, first=True)
        load.wait_layer(0)
        assert (coded.read(6) == coded.records[0]).all()
        assert (coded.read(8) == coded.expected(codec, coded.records[2])).all()
        assert load.wait().all()


@everywhere
def test_a_layer_save_tells_what_was_declined(coded: Coded) -> None:
    coded.write(1, unfit("plane", coded))
    with coded.engine("plane") as engine:
        save = engine.save_blocks(keys_of(0, 1), [0, 1], layerwise=True)
        for layer in range(3):
            save.save_layer(layer)
        assert save.wait().tolist() == [True, False]
        assert engine.get_stats().overlong_blocks == 1


@everywhere
def test_lossless_codecs_do_not_ask(coded: Coded) -> None:
    for codec in ("raw", "plane"):
        with coded.engine(codec) as engine:
            for first in (None, True, False, [True, False]):
                assert engine.save_blocks(keys_of(1, 2), [1, 2], first=first).wait().all()
                assert engine.check_blocks(keys_of(1, 2), first=first).all()
                assert engine.prefetch(keys_of(1, 2), first=first).wait().all()


@each
def test_slots_in_any_order_and_apart(codec: str, coded: Coded) -> None:
    """As an index gives them out that has dropped this and that; each chunk of a GPU's plan has several runs of neighbours.

    Slots and digests are what the codec's own calls make, on every device: first blocks in parts too.
    """
    coded.write(4, unfit(codec, coded))
    with coded.engine(codec, gpu_pool_size_bytes=8 * 20 * 20480) as engine:
        rows = engine._coding.rows(keys_of(*range(BLOCKS)), np.isin(np.arange(BLOCKS), [3, 8]))
        blocks, slots = np.arange(BLOCKS) if rows.block is None else rows.block, np.random.default_rng(9).permutation(30)
        slots, parts = slots[: len(blocks)], np.full(len(blocks), -1) if rows.parts is None else rows.parts
        assert engine.codec is not None and (np.diff(np.sort(slots)) == 1).any() and (np.diff(np.sort(slots)) > 1).any()
        save = submit_blocks(engine._executor, Direction.SAVE, blocks, slots, None, rows.parts)
        assert poll(save.query, time.monotonic() + 60) and save.error is None
        assert save.unfit is not None and (save.unfit == (blocks == 4)).all() and save.digests is not None
        fit = np.flatnonzero(blocks != 4)
        for at in fit:
            record = slot_of(engine, int(slots[at]))[: engine.codec.slot_bytes].tobytes()
            assert record == slot_of_page(engine.codec, coded.records[blocks[at]], int(parts[at])), (blocks[at], parts[at])
            assert save.digests[at].tobytes() == digest(record)
        for block in range(BLOCKS):
            coded.write(block, np.zeros(coded.shape.raw_bytes, np.uint8))
        slot_of(engine, int(slots[-1]))[0] ^= 1  # the header's first byte
        some = None if rows.parts is None else rows.parts[fit]
        load = submit_blocks(engine._executor, Direction.LOAD, blocks[fit], slots[fit], None, some)
        assert poll(load.query, time.monotonic() + 60) and load.error is None
        assert load.unfit is not None and (load.unfit == (fit == len(blocks) - 1)).all() and load.digests is not None
        for at, found in zip(fit, load.digests, strict=True):
            if at != len(blocks) - 1:
                first = bool(rows.parts is not None and rows.parts[at] >= 0)
                assert (coded.read(blocks[at]) == coded.expected(codec, coded.records[blocks[at]], first)).all()
                assert (found == save.digests[at]).all()
        assert not coded.read(blocks[-1]).any()
