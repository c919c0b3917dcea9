"""First blocks of sequences under codecs with loss: kept as they are, in several slots, and found only as first blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvortex.codecs import make_codec
from kvortex.codecs.base import HEADER
from kvortex.errors import ArgumentError, CorruptBlocksError
from tests.engine.coded import EACH_LOSSY, LOSSY, Coded, parts_of, slot_of, slots_of
from tests.engine.tiered import nothing_is_held
from tests.pages import keys_of

each = pytest.mark.parametrize(("codec", "where"), EACH_LOSSY, indirect=["where"])


@each
def test_a_first_block_lies_as_it_is_in_several_slots(codec: str, coded: Coded) -> None:
    with coded.engine(codec) as engine:
        made = make_codec(codec, coded.shape, coded.tables)
        assert engine.save_blocks(keys_of(1), [4], first=True).wait().all()
        rows = engine._coding.rows(keys_of(1), True)
        assert engine.get_stats().resident_blocks == parts_of(engine) == len(rows.keys) > 1
        whole = b""
        for part, slot in enumerate(slots_of(engine, rows.keys)):
            record = slot_of(engine, slot)[: made.slot_bytes]
            header = record[: HEADER.itemsize].view(HEADER)[0]
            assert header["part"] == part and header["digest"].tobytes() == made.digest
            whole += record[HEADER.itemsize : header["used_bytes"]].tobytes()
            assert not record[int(header["used_bytes"]) :].any()
        assert whole == coded.records[4].tobytes()


@each
def test_a_first_block_may_hold_anything(codec: str, coded: Coded) -> None:
    wild = np.random.default_rng(11).integers(0, 256, coded.shape.raw_bytes, np.uint8)
    coded.write(2, wild)
    with coded.engine(codec) as engine:
        assert engine.save_blocks(keys_of(1, 2), [1, 2], first=[False, True]).wait().all()
        assert engine.load_blocks(keys_of(2), [7], first=True).wait().all()
        assert (coded.read(7) == wild).all()


@each
def test_damage_in_a_part_of_a_first_block_is_seen(codec: str, coded: Coded) -> None:
    with coded.engine(codec) as engine:
        for part in range(parts_of(engine)):
            assert engine.save_blocks(keys_of(1), [1], first=True).wait().all()
            slot_of(engine, slots_of(engine, engine._coding.rows(keys_of(1), True).keys)[part])[100] ^= 4
            ticket = engine.load_blocks(keys_of(1), [7], first=True)
            assert not ticket.wait().any() and isinstance(ticket.error, CorruptBlocksError)
            assert not engine.check_blocks(keys_of(1), first=True).any()


@each
def test_one_part_is_not_taken_for_another(codec: str, coded: Coded) -> None:
    with coded.engine(codec) as engine:
        assert engine.save_blocks(keys_of(1), [1], first=True).wait().all()
        slots = slots_of(engine, engine._coding.rows(keys_of(1), True).keys)
        kept = engine._parts.digests
        assert kept is not None
        slot_of(engine, slots[0])[:] = slot_of(engine, slots[1])
        kept[slots[0]] = kept[slots[1]]
        ticket = engine.load_blocks(keys_of(1), [7], first=True)
        assert not ticket.wait().any() and "no records of the codec" in str(ticket.error)


@pytest.mark.parametrize("codec", LOSSY)
def test_a_codec_with_loss_is_told_which_blocks_are_first(codec: str, coded: Coded) -> None:
    with coded.engine(codec) as engine:
        keys = keys_of(1, 2)
        calls: list[Any] = [
            lambda **how: engine.save_blocks(keys, [1, 2], **how),
            lambda **how: engine.load_blocks(keys, [1, 2], **how),
            lambda **how: engine.check_blocks(keys, **how),
            lambda **how: engine.prefetch(keys, **how),
        ]
        for call in calls:
            with pytest.raises(ArgumentError, match=f"first is missing: codec {codec} keeps the first block"):
                call()
            for wrong in ([True], [1, 0], 1, "yes", np.zeros((2, 1), bool), [True, None], np.ma.masked_array([True, False])):
                with pytest.raises(ArgumentError, match="^first "):
                    call(first=wrong)
        with pytest.raises(ArgumentError, match=r"keys\[1\] and keys\[2\] are the same key"):
            engine.save_blocks(keys_of(3, 1, 1), [1, 2, 3], first=True)
        assert engine.save_blocks(keys[:0], [], first=[]).wait().shape == (0,)
        assert not engine.get_stats().resident_blocks


def test_first_blocks_are_found_as_such_alone(coded: Coded) -> None:
    with coded.engine("k4v4") as engine:
        assert engine.save_blocks(keys_of(1, 2), [1, 2], first=True).wait().all()
        assert engine.check_blocks(keys_of(1, 2), first=True).tolist() == [True, True]
        assert engine.check_blocks(keys_of(1, 2), first=False).tolist() == [False, True]
        assert engine.check_blocks(keys_of(2, 1), first=[False, True]).tolist() == [True, True]
        assert engine.load_blocks(keys_of(1, 2), [7, 8], first=[True, True]).wait().tolist() == [True, False]
        assert (coded.read(8) == coded.records[8]).all()
        assert engine.drop_blocks(keys_of(1, 2, 3)) == 2
        assert not engine.get_stats().resident_blocks
        nothing_is_held(engine)


@each
def test_a_first_block_with_a_part_gone_is_a_miss(codec: str, coded: Coded) -> None:
    with coded.engine(codec) as engine:
        for part in range(parts_of(engine)):
            assert engine.save_blocks(keys_of(1, 2), [1, 2], first=True).wait().all()
            engine._index.drop(engine._coding.rows(keys_of(1), True).keys[part : part + 1])
            assert engine.check_blocks(keys_of(1, 2), first=True).tolist() == [False, True]
            ticket = engine.load_blocks(keys_of(1, 2), [7, 8], first=True)
            assert ticket.wait().tolist() == [False, True] and ticket.error is None
        assert "of 2 blocks" in repr(ticket)
        nothing_is_held(engine)


@each
def test_a_small_pool_evicts_and_stays_right(codec: str, coded: Coded) -> None:
    with coded.engine(codec, slots=4) as engine:
        capacity = engine.get_stats().capacity_blocks
        for turn in range(40):
            keys, pages = keys_of(turn, 1000 + turn), [turn % 6, (turn + 1) % 6]
            assert engine.save_blocks(keys, pages, first=True).wait().all()
            assert engine.load_blocks(keys, [7, 8], first=True).wait().all()
            assert (coded.read(7) == coded.records[pages[0]]).all()
            assert (coded.read(8) == coded.expected(codec, coded.records[pages[1]])).all()
        assert engine.get_stats().resident_blocks <= capacity
        nothing_is_held(engine)


@each
def test_parts_count_in_counters_of_slots(codec: str, coded: Coded) -> None:
    with coded.engine(codec, admit_after=2) as engine:
        parts = parts_of(engine)
        assert not engine.load_blocks(keys_of(1, 2), [7, 8], first=True).wait().any()
        assert not engine.save_blocks(keys_of(1, 2), [1, 2], first=True).wait().any()  # offered for the first time
        assert engine.save_blocks(keys_of(1, 2), [1, 2], first=True).wait().all()
        slot_of(engine, slots_of(engine, engine._coding.rows(keys_of(1), True).keys)[0])[100] ^= 4
        ticket = engine.load_blocks(keys_of(1, 2), [7, 8], first=True)
        assert ticket.wait().tolist() == [False, True] and ticket.nbytes == 2 * coded.shape.raw_bytes
        assert engine.check_blocks(keys_of(1, 2), first=True).tolist() == [False, True]
        stats = engine.get_stats()
        assert stats.missed_blocks == stats.declined_blocks == stats.saved_blocks == stats.loaded_blocks == parts + 1 > 2
        assert (stats.corrupt_blocks, stats.resident_blocks) == (1, parts)
        assert stats.saved_bytes == stats.loaded_bytes == 2 * coded.shape.raw_bytes
        assert (stats.checked_blocks, stats.hit_blocks) == (2, 1)
