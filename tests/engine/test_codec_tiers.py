"""Coded records below RAM: they go down and come back as they are, under the codec's number, and no other codec reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvortex import ConfigError
from kvortex.codecs import CODECS
from kvortex.codecs.base import HEADER as CODED_HEADER
from kvortex.codecs.base import HEADER_BYTES as CODED_BYTES
from kvortex.tiers.disk.tools import listing, verify
from kvortex.tiers.memory import MemoryStore
from kvortex.tiers.record import HEADER, HEADER_BYTES
from tests.engine.coded import CODED, EACH, LOSSY, Coded, parts_of
from tests.engine.tiered import Tiers, nothing_is_held, until
from tests.pages import keys_of


def tiers_of(store: MemoryStore) -> Tiers:
    return Tiers(store, read_timeout_s=20.0, write_timeout_s=20.0, absent_s=0.01)  # of a busy machine


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize(("codec", "where"), EACH, indirect=["where"])
def test_down_and_up(codec: str, digests: bool, coded: Coded) -> None:
    store, keys, first = MemoryStore(), keys_of(*range(4)), [True, False, True, False]
    with coded.engine(codec, tiers=tiers_of(store).config, digests=digests) as engine:
        assert engine.save_blocks(keys, np.arange(4), first=first).wait().all()
        assert engine.flush()
        count = 2 * parts_of(engine) + 2
        slot_bytes = engine._parts.record_bytes
    assert len(store.objects) == count
    for record in store.objects.values():
        header = np.frombuffer(record[:HEADER_BYTES], HEADER)[0]
        assert header["codec"] == CODECS[codec].number and header["block_bytes"] == coded.shape.raw_bytes
        coded_header = np.frombuffer(record[HEADER_BYTES : HEADER_BYTES + CODED_BYTES], CODED_HEADER)[0]
        assert header["payload_bytes"] == coded_header["used_bytes"] == len(record) - HEADER_BYTES <= slot_bytes
    with coded.engine(codec, tiers=tiers_of(store).config, digests=digests) as engine:  # another one
        assert engine.check_blocks(keys, first=first, timeout=20).all()
        ticket = engine.load_blocks(keys, np.arange(6, 10), first=first)
        assert ticket.wait().all() and ticket.nbytes == 4 * coded.shape.raw_bytes
        for at in range(4):
            assert (coded.read(6 + at) == coded.expected(codec, coded.records[at], first[at])).all()
        assert engine.drop_blocks(keys) == 4
        until(lambda: not store.objects)
        prefetch = engine.prefetch(keys, first=first)
        assert not prefetch.wait(20).any() and prefetch.mask.shape == (4,)
        nothing_is_held(engine)


def test_prefetch_brings_all_parts(coded: Coded) -> None:
    store, keys = MemoryStore(), keys_of(1, 2)
    with coded.engine("k4v4", tiers=tiers_of(store).config) as engine:
        assert engine.save_blocks(keys, [1, 2], first=True).wait().all()
        assert engine.flush()
    with coded.engine("k4v4", tiers=tiers_of(store).config) as engine:
        assert engine.prefetch(keys, first=True).wait(20).tolist() == [True, True]
        assert engine.get_stats().resident_blocks == parts_of(engine) + 1
        assert engine.load_blocks(keys, [7, 8], first=True, fetch=False).wait().all()
        assert (coded.read(7) == coded.records[1]).all()


def test_what_was_declined_is_in_no_tier(coded: Coded) -> None:
    coded.write(1, np.random.default_rng(1).integers(0, 256, coded.shape.raw_bytes, np.uint8))
    store = MemoryStore()
    with coded.engine("plane", tiers=tiers_of(store).config) as engine:
        assert engine.save_blocks(keys_of(0, 1, 2), [0, 1, 2]).wait().tolist() == [True, False, True]
        assert engine.flush() and len(store.objects) == 2
        assert not any(engine.get_stats().tiers[0].dropped.values()), "it was not even offered"


def test_each_codec_sees_its_own_alone(coded: Coded, tmp_path: Path) -> None:
    """Side by side in one store; the same codec with other tables is another."""
    store, keys, other = MemoryStore(), keys_of(1, 2), Coded.make(tmp_path, seed=9)
    codecs = [("raw", coded), *((codec, coded) for codec in CODED), ("plane", other), ("k4v3", other)]
    for at, (codec, one) in enumerate(codecs):
        with one.engine(codec, tiers=tiers_of(store).config) as engine:
            mine = engine.block_keys(np.arange(32))
            for asked in (mine, keys):  # a caller's own keys are the same for all: what tells records apart is the namespace
                assert not engine.load_blocks(asked, [7, 8], first=False).wait().any(), (at, codec)
                assert engine.save_blocks(asked, [1, 2], first=False).wait().all()
            assert engine.flush()
    for codec, one in codecs:
        with one.engine(codec, tiers=tiers_of(store).config) as engine:
            assert engine.load_blocks(engine.block_keys(np.arange(32)), [7, 8], first=False).wait().all()
            assert (one.read(8) == one.expected(codec, one.records[2])).all()


@pytest.mark.parametrize("codec", ["plane", "k4v4"])
def test_damage_below_is_a_miss(codec: str, coded: Coded) -> None:
    store, keys = MemoryStore(), keys_of(1, 2)
    with coded.engine(codec, tiers=tiers_of(store).config) as engine:
        assert engine.save_blocks(keys, [1, 2], first=False).wait().all()
        assert engine.flush()
    name = next(name for name in store.objects if name.endswith(keys[1].tobytes()))
    hurt = bytearray(store.objects[name])
    hurt[HEADER_BYTES + 500] ^= 1
    store.objects[name] = bytes(hurt)
    with coded.engine(codec, tiers=tiers_of(store).config) as engine:
        assert engine.load_blocks(keys, [7, 8], first=False).wait().tolist() == [True, False]
        nothing_is_held(engine)


@pytest.mark.parametrize("codec", ["plane", "k4v4"])
def test_a_folder_is_found_again(codec: str, coded: Coded, tmp_path: Path) -> None:
    url = f"disk:{tmp_path / 'kv'}?capacity=2MiB&read_timeout_s=20&write_timeout_s=20"
    keys, first = keys_of(*range(4)), True
    with coded.engine(codec, tiers=(url,)) as engine:
        assert engine.save_blocks(keys, np.arange(4), first=first).wait().all()
        assert engine.flush()
        count = parts_of(engine) + 3
    assert listing(str(tmp_path / "kv")).records == count
    assert (seen := verify(str(tmp_path / "kv"))).right == count and not seen.corrupt
    with coded.engine(codec, tiers=(url,)) as engine:
        assert engine.load_blocks(keys, np.arange(6, 10), first=first).wait().all()
        for at in range(4):
            assert (coded.read(6 + at) == coded.expected(codec, coded.records[at], at == 0)).all()
    for other in {"raw", "plane", "k4v4"} - {codec}:
        with pytest.raises(ConfigError, match=r"another model, layout, codec or rank|slots of \d+ bytes"):
            coded.engine(other, tiers=(url,)).shutdown()


def test_all_lossy_codecs_have_other_numbers() -> None:
    assert len({CODECS[codec].number for codec in LOSSY}) == len(LOSSY)
