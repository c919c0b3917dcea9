"""A codec of its own for a tier: what goes down and comes back, who sees it, and what must be told of loss."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex import ConfigError, KVortexConfig, KVortexEngine
from kvortex.codecs import CODECS, make_codec
from kvortex.codecs.base import HEADER_BYTES as CODED_BYTES
from kvortex.devices import Device, HostDevice
from kvortex.errors import ArgumentError, CodecWarning
from kvortex.tiers import TierOptions, tools
from kvortex.tiers.disk.tools import listing, verify
from kvortex.tiers.envelope import ENVELOPE, ENVELOPE_BYTES
from kvortex.tiers.memory import MemoryStore
from kvortex.tiers.record import HEADER, HEADER_BYTES, RecordFormat
from perf.faulty import RECORD_FAULTS
from tests.codecs.sample import tables_of
from tests.engine.coded import GPUS, Coded, D, H, L, RecordShape, T, slot_of, slots_of
from tests.engine.tiered import Tiers, nothing_is_held, until
from tests.pages import Bytes, PagedCache, Tensor, keys_of
from tests.tiers.resigned import signed

PATIENT: dict[str, Any] = {"read_timeout_s": 20.0, "write_timeout_s": 20.0, "absent_s": 0.01}  # of a busy machine
IN_URL = "&".join(f"{name}={value}" for name, value in PATIENT.items())
EXACT = [("raw", "plane"), ("plane", "raw")]
LOSS = [*(("raw", codec) for codec in ("int8", "k4v3", "cachegen")), ("plane", "k6v4"), ("plane", "cachegen")]


@pytest.fixture
def coded(tmp_path: Path) -> Coded:
    return Coded.make(tmp_path)


def tiers_of(store: MemoryStore, codec: str | None = None, **options: Any) -> Tiers:
    return Tiers(store, codec=codec, **PATIENT | options)


def engine_of(coded: Coded, pool: str, store: MemoryStore, codec: str | None, **options: Any) -> Any:
    return coded.engine(pool, tiers=tiers_of(store, codec).config, **options)


def back(coded: Coded, codec: str, record: Bytes, first: bool = False, **parameters: Any) -> Bytes:
    """What a tier with a codec gives back."""
    made = make_codec(codec, coded.shape, coded.tables, **parameters)
    return np.frombuffer(made.decode(made.encode(record, first=first)), np.uint8)


def header_of(record: bytes) -> Any:
    return np.frombuffer(record[:HEADER_BYTES], HEADER)[0]


def envelope_of(record: bytes) -> Any:
    return np.frombuffer(record[HEADER_BYTES : HEADER_BYTES + ENVELOPE_BYTES], ENVELOPE)[0]


@pytest.mark.parametrize(("pool", "codec"), [*EXACT, *LOSS])
def test_down_and_up(pool: str, codec: str, coded: Coded) -> None:
    store, keys, first = MemoryStore(), keys_of(*range(4)), [True, False, True, False]
    with engine_of(coded, pool, store, codec) as engine:
        assert engine.save_blocks(keys, np.arange(4), first=first).wait().all()
        assert engine.flush()
        stats, slot_bytes = engine.get_stats().tiers[0].codec, engine._parts.record_bytes
        assert stats.codec == codec and not stats.refused and stats.encoded_blocks == 4 and stats.encode_seconds > 0
        assert stats.encoded_from_bytes == 4 * slot_bytes
    sizes = [len(record) - HEADER_BYTES for record in store.objects.values()]
    assert len(sizes) == 4 and sum(sizes) == stats.encoded_to_bytes
    for record in store.objects.values():
        header, envelope = header_of(record), envelope_of(record)
        assert header["codec"] == envelope["codec"] == CODECS[codec].number and header["block_bytes"] == coded.shape.raw_bytes
        assert header["payload_bytes"] == ENVELOPE_BYTES + envelope["coded_bytes"] == len(record) - HEADER_BYTES
        assert envelope["slot_bytes"] == slot_bytes
    with engine_of(coded, pool, store, codec) as engine:  # another one
        assert engine.check_blocks(keys, first=first, timeout=20).all()
        assert engine.load_blocks(keys, np.arange(6, 10), first=first).wait().all()
        for at in range(4):
            assert (coded.read(6 + at) == back(coded, codec, coded.records[at], first[at])).all()
            assert not first[at] or (coded.read(6 + at) == coded.records[at]).all(), "attention sinks are kept exactly"
        found = engine.get_stats().tiers[0].codec
        assert (found.decoded_blocks, found.decoded_to_bytes) == (4, 4 * slot_bytes) and found.decode_seconds > 0
        assert found.decoded_from_bytes == stats.encoded_to_bytes and not found.refused
        assert engine.drop_blocks(keys) == 4
        until(lambda: not store.objects)
        nothing_is_held(engine)


@pytest.mark.parametrize("pool", ["raw", "plane"])
@pytest.mark.parametrize("where", GPUS, indirect=True)
def test_above_a_gpu(pool: str, where: Device, tmp_path: Path) -> None:
    """Slots that a GPU has filled are coded by the host all the same."""
    coded, store, keys = Coded.make(tmp_path, device=where), MemoryStore(), keys_of(1, 2)
    with engine_of(coded, pool, store, "cachegen") as engine:
        assert engine.save_blocks(keys, [1, 2], first=True).wait().all() and engine.flush()
    with engine_of(coded, pool, store, "cachegen") as engine:
        assert engine.load_blocks(keys, [7, 8], first=True).wait().all()
        assert (coded.read(7) == coded.records[1]).all()
        assert (coded.read(8) == back(coded, "cachegen", coded.records[2])).all()
        assert not engine.get_stats().tiers[0].codec.refused


@pytest.mark.parametrize("pool", ["raw", "plane"])
def test_without_digests_of_the_pool(pool: str, coded: Coded) -> None:
    store, keys, codec = MemoryStore(), keys_of(1, 2), {"raw": "plane", "plane": "raw"}[pool]
    with engine_of(coded, pool, store, codec, digests=False) as engine:
        assert engine.save_blocks(keys, [1, 2]).wait().all() and engine.flush()
    with engine_of(coded, pool, store, codec, digests=False) as engine:
        assert engine.load_blocks(keys, [7, 8]).wait().all() and (coded.read(8) == coded.records[2]).all()


@pytest.mark.parametrize("codec", ["plane", "cachegen", "k4v4"])
@pytest.mark.parametrize("pool", ["raw", "plane"])
def test_a_disk_has_smaller_slots_and_keeps_long_records_in_parts(pool: str, codec: str, coded: Coded, tmp_path: Path) -> None:
    coded.write(3, np.random.default_rng(1).integers(0, 256, coded.shape.raw_bytes, np.uint8))  # no model's: not even plane
    noise, url = coded.read(3), f"disk:{tmp_path / 'kv'}?capacity=4MiB&{IN_URL}&codec={codec}"
    blocks = [0, 1, 2, 3] if pool == "raw" else [0, 1, 2]  # a pool of plane does not take noise
    keys, first = keys_of(*blocks), True
    with coded.engine(pool, tiers=(url,)) as engine:
        assert engine.save_blocks(keys, blocks, first=first).wait().all()
        assert engine.flush()
    own, seen = make_codec(codec, coded.shape, coded.tables), listing(str(tmp_path / "kv"))
    if codec == pool:
        assert seen.slot_bytes == 4096 + -(-own.slot_bytes // 4096) * 4096 and seen.records == 3
    else:
        assert seen.slot_bytes == 4096 + -(-(ENVELOPE_BYTES + own.slot_bytes) // 4096) * 4096
        assert seen.slot_bytes < 4096 + coded.shape.raw_bytes
        sizes = [len(own.encode(coded.read(at), first=at == 0)) for at in blocks]
        parts = [-(-size // (seen.slot_bytes - 4096 - ENVELOPE_BYTES)) for size in sizes]
        assert seen.records == sum(parts) and (max(parts) > 1) == (codec != "plane" or pool == "raw")
    assert verify(str(tmp_path / "kv")).right == seen.records and seen.codecs == (f"{codec}: {seen.records} records",)
    with coded.engine(pool, tiers=(url,)) as engine:
        assert engine.check_blocks(keys, first=first).all()
        assert engine.load_blocks(keys, np.arange(6, 6 + len(keys)), first=first).wait().all()
        assert (coded.read(6) == coded.records[0]).all()
        assert (coded.read(7) == back(coded, codec, coded.records[1])).all()
        assert pool != "raw" or (coded.read(9) == noise).all()
        nothing_is_held(engine)
        engine.drop_blocks(keys)
        until(lambda: not engine._cascade.lines[0].tier.used_bytes())


def test_first_blocks_must_be_told_of(coded: Coded) -> None:
    store, keys = MemoryStore(), keys_of(1, 2)
    with engine_of(coded, "raw", store, "cachegen") as engine:
        calls = [engine.check_blocks, engine.prefetch, lambda keys: engine.save_blocks(keys, [1, 2])]
        for call in (*calls, lambda keys: engine.load_blocks(keys, [1, 2])):
            with pytest.raises(ArgumentError, match="first is missing: codec cachegen"):
                call(keys)
        assert engine.save_blocks(keys, [1, 2], first=True).wait().all()
        with pytest.raises(ArgumentError, match="same key"):
            engine.save_blocks(keys_of(3, 3), [3, 4], first=True)
        assert engine.check_blocks(keys, first=True).all()
        assert engine.check_blocks(keys, first=False).tolist() == [False, True], "a wrong first is a miss"
        assert engine.flush() and engine.drop_blocks(keys) == 2 and not engine.get_stats().resident_blocks
        buffer = np.zeros(coded.shape.raw_bytes, np.uint8)
        with pytest.raises(ArgumentError, match="codec cachegen codes pages"):
            engine.save_blocks(keys_of(9), data_ptrs=[buffer.ctypes.data], sizes=[buffer.nbytes], first=False)
        with pytest.raises(ArgumentError, match="no opaque buffers with codec cachegen"):
            engine.prefetch(keys, [64, 64], first=True)
    for pool, codec in EXACT:
        with engine_of(coded, pool, store, codec) as engine:
            assert not engine.check_blocks(keys).any()


def test_keys_that_differ_in_a_bit_are_not_mixed_up(coded: Coded) -> None:
    store, keys = MemoryStore(), keys_of(6, 7)
    with engine_of(coded, "raw", store, "int8") as engine:
        for first in (False, True):
            assert engine.save_blocks(keys, [6, 7], first=first).wait().all()
        assert engine.load_blocks(keys, [1, 2], first=False).wait().all()
        assert (coded.read(1) == coded.records[6]).all() and (coded.read(2) == coded.records[7]).all()


def test_each_codec_sees_its_own_alone(coded: Coded, tmp_path: Path) -> None:
    """Side by side in one store: codecs, levels, tables, and what slots hold."""
    store, keys, other = MemoryStore(), keys_of(1, 2), Coded.make(tmp_path, seed=9)
    kinds: list[tuple[Coded, str, dict[str, Any]]] = [(coded, "raw", {"codec": None}), (coded, "plane", {"codec": None})]
    kinds += [(coded, "raw", {"codec": codec}) for codec in ("plane", "int8", "cachegen")]
    kinds += [(coded, "raw", {"codec": "cachegen", "codec_level": 0}), (other, "raw", {"codec": "cachegen"})]
    kinds += [(coded, "plane", {"codec": "cachegen"}), (other, "raw", {"codec": "plane"})]
    for at, (one, pool, options) in enumerate(kinds):
        with one.engine(pool, tiers=Tiers(store, **PATIENT | options).config) as engine:
            assert not engine.load_blocks(keys, [7, 8], first=False).wait().any(), (at, pool, options)
            assert engine.save_blocks(keys, [1, 2], first=False).wait().all() and engine.flush()
    assert len(store.objects) == 2 * len(kinds)
    for one, pool, options in kinds:
        with one.engine(pool, tiers=Tiers(store, **PATIENT | options).config) as engine:
            assert engine.load_blocks(keys, [7, 8], first=False).wait().all()
            level = {"level": options["codec_level"]} if "codec_level" in options else {}
            assert (one.read(8) == back(one, options["codec"] or "raw", one.records[2], **level)).all()


def test_loss_below_is_seen_by_none_who_has_not_agreed_to_it(coded: Coded) -> None:
    """What came from below with loss lies in tiers above, which others share."""
    shared, below, keys = MemoryStore(), MemoryStore(), keys_of(1, 2)
    both = (*tiers_of(shared).config, *tiers_of(below, "cachegen").config)
    with coded.engine("raw", tiers=both) as engine:
        assert engine.save_blocks(keys, [1, 2], first=False).wait().all() and engine.flush()
    shared.objects.clear()
    with coded.engine("raw", tiers=both) as engine:
        assert engine.load_blocks(keys, [7, 8], first=False).wait().all() and engine.flush()
        until(lambda: len(shared.objects) == 2)
    with coded.engine("raw", tiers=tiers_of(shared).config) as engine:
        assert not engine.load_blocks(keys, [7, 8]).wait().any()
    with coded.engine("raw", tiers=both) as engine:
        assert engine.load_blocks(keys, [7, 8], first=False).wait().all()
        assert (coded.read(7) == back(coded, "cachegen", coded.records[1])).all()


def test_tiers_with_several_codecs(coded: Coded, tmp_path: Path) -> None:
    keys = keys_of(*range(4))
    url = f"disk:{tmp_path / 'kv'}?capacity=4MiB&{IN_URL}&codec=plane"
    below = MemoryStore()
    with coded.engine("raw", tiers=(url, *tiers_of(below, "cachegen").config)) as engine:
        assert engine.save_blocks(keys, np.arange(4), first=True).wait().all() and engine.flush()
        assert len(below.objects) == 4
        engine._index.drop(engine._coding.rows(keys, True).keys)
        assert engine.load_blocks(keys, np.arange(6, 10), first=True).wait().all()
        for at in range(4):
            assert (coded.read(6 + at) == coded.records[at]).all(), "the disk's, which is the faster one"
        names = [(tier.tier, tier.codec.codec, tier.codec.decoded_blocks) for tier in engine.get_stats().tiers]
        assert names == [("disk", "plane", 4), ("memory", "cachegen", 0)]


def test_what_a_slot_lost_in_ram_is_not_stored(coded: Coded) -> None:
    store, keys = MemoryStore(), keys_of(1, 2)
    tiers = tiers_of(store, "plane", mode="back", write_delay_s=600.0)
    with coded.engine("raw", tiers=tiers.config) as engine:
        assert engine.save_blocks(keys, [1, 2]).wait().all()
        slot_of(engine, slots_of(engine, keys)[0])[100] ^= 4
        assert engine.flush() and len(store.objects) == 1
        stats = engine.get_stats().tiers[0]
        assert stats.codec.refused == {"slot": 1} and stats.dropped == {"corrupt": 1} and stats.codec.encoded_blocks == 1
        nothing_is_held(engine)


@pytest.mark.parametrize(("pool", "codec"), [("raw", "plane"), ("plane", "cachegen"), ("plane", None)])
def test_a_tier_that_does_everything_wrong(pool: str, codec: str | None, coded: Coded) -> None:
    """Records are damaged, cut, exchanged and lost, and calls fail, while blocks come and go: right bytes, or a miss."""
    store, rng, keys = MemoryStore(), np.random.default_rng(11), keys_of(*range(6))
    first = np.arange(6) % 2 == 0
    expected = np.stack([back(coded, codec or pool, coded.records[at], bool(first[at])) for at in range(6)])
    breaker = {"failures": 10_000, "lost_s": 1e6}
    tiers = Tiers(store, breaker=breaker, codec=codec, **PATIENT | {"absent_s": 1e-3, "fresh_s": 1e-3})
    faults, came = (*RECORD_FAULTS, "raise", "failed", "timeout", "nonsense"), 0
    with coded.engine(pool, slots=16, tiers=tiers.config) as engine:
        tiers[0].plan = lambda operation: str(rng.choice(faults)) if rng.random() < 0.4 else None
        for _ in range(50):
            for at in range(6):
                coded.write(at, coded.records[at])
            saved = engine.save_blocks(keys, np.arange(6), first=first).wait()
            assert saved.all() and engine.flush()
            engine._index.drop(engine._coding.rows(keys, first).keys)
            for block in range(6, 12):
                coded.write(block, np.zeros(coded.shape.raw_bytes, np.uint8))
            found = engine.load_blocks(keys, np.arange(6, 12), first=first).wait()
            for at in np.flatnonzero(found):
                assert (coded.read(6 + at) == expected[at]).all()
            came += int(found.sum())
            engine._index.drop(engine._coding.rows(keys, first).keys)
        tiers[0].plan = lambda _: None
        assert 0 < came < 300 and sum(tiers[0].injected.values()) > 50
        nothing_is_held(engine)


@pytest.mark.parametrize("pool", ["plane", "int8"])
def test_no_zeros_behind_records(pool: str, coded: Coded) -> None:
    """Tiers get what records are, and still read what has all of a slot, as they were given before."""
    store, keys = MemoryStore(), keys_of(1, 2, 3)
    with engine_of(coded, pool, store, None) as engine:
        assert engine.save_blocks(keys, [1, 2, 3], first=False).wait().all() and engine.flush()
        stats, slot_bytes = engine.get_stats().tiers[0], engine._parts.record_bytes
    own = make_codec(pool, coded.shape, coded.tables)
    sizes = {len(record) - HEADER_BYTES for record in store.objects.values()}
    assert sizes == {len(own.encode(coded.records[at])) for at in (1, 2, 3)}
    assert stats.codec.encoded_from_bytes == 3 * slot_bytes and stats.codec.encoded_to_bytes == stats.of("put").nbytes
    assert pool == "int8" or max(sizes) < slot_bytes
    (name, old), *_ = store.objects.items()
    header = np.frombuffer(old[:HEADER_BYTES], HEADER)
    whole = old[HEADER_BYTES:].ljust(slot_bytes, b"\0")
    form = RecordFormat(header["namespace"].tobytes(), 1 << 20, int(header["codec"][0]), int(header["block_bytes"][0]))
    store.put(name, signed(form, header["key"], whole))
    with engine_of(coded, pool, store, None) as engine:
        assert engine.load_blocks(keys, [7, 8, 9], first=False).wait().all()
        for at in (1, 2, 3):
            assert (coded.read(6 + at) == coded.expected(pool, coded.records[at])).all()
        assert slot_of(engine, slots_of(engine, keys)[0])[max(sizes) : slot_bytes].any() == 0


def test_a_header_that_lies_about_a_length(coded: Coded) -> None:
    store, keys = MemoryStore(), keys_of(1)
    with engine_of(coded, "plane", store, None) as engine:
        assert engine.save_blocks(keys, [1]).wait().all() and engine.flush()
    (name, record), *_ = store.objects.items()
    header = np.frombuffer(record[:HEADER_BYTES], HEADER)
    form = RecordFormat(header["namespace"].tobytes(), 1 << 20, int(header["codec"][0]), int(header["block_bytes"][0]))
    body = record[HEADER_BYTES:]
    for payload in (body[:-8], body[: CODED_BYTES - 1], b"", body + bytes(8)):
        store.put(name, signed(form, header["key"], payload))
        with engine_of(coded, "plane", store, None) as engine:
            assert not engine.load_blocks(keys, [7]).wait().any()
            assert engine.get_stats().tiers[0].codec.refused == {"length": 1}
            nothing_is_held(engine)


# -- choices

LATENT = RecordShape(L, 1, 512, parts="L")


def test_what_is_refused(coded: Coded, tmp_path: Path) -> None:
    def refused(pool: str, url: str, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            coded.engine(pool, tiers=(url,), **options).shutdown()
        return str(caught.value)

    assert "codec = 'zip': must be one of raw, plane" in refused("raw", "memory:x?codec=zip")
    assert "only cachegen has levels" in refused("raw", "memory:x?codec=plane&codec_level=1")
    assert "only cachegen has levels" in refused("raw", "memory:x?codec_level=1")
    for level in (3, -1):
        url = f"memory:x?codec=cachegen&codec_level={level}"
        assert f"codec_level = {level}: must be an integer from 0 to 2" in refused("raw", url)
    for pool, codec in (("k4v4", "cachegen"), ("int8", "plane"), ("k4v3", "raw")):
        assert f"tiers[0]: codec = '{codec}': the pool's codec, {pool}, has lost" in refused(pool, f"memory:x?codec={codec}")
    with pytest.raises(ConfigError, match=r"tiers\[0\]: codec = 'cachegen': needs codec_tables"):
        coded.cache.engine(tiers=("memory:x?codec=cachegen",))
    assert "opaque buffers" in refused("raw", "memory:x?codec=plane", max_block_bytes=4096)
    assert "block_size = 32" in refused("raw", "memory:x?codec=plane", block_size=32)
    assert "codes bfloat16" in refused("raw", "memory:x?codec=int8", dtype="float16")
    plain = PagedCache.plain(HostDevice())
    with pytest.raises(ConfigError, match="not for this layout: a block has"):
        plain.engine(tiers=("memory:x?codec=cachegen",), codec_tables=str(coded.path))
    tables_of(LATENT, np.random.default_rng(3)).save(tmp_path / "t", LATENT)
    pages = PagedCache(HostDevice(), [Tensor(HostDevice(), (4, T, 512)) for _ in range(L)], 0)
    with pytest.raises(ConfigError, match="latent was never measured"):
        pages.engine(codec_tables=str(tmp_path / "t"), tiers=("memory:x?codec=k4v4",))


def test_what_is_warned_of(coded: Coded, tmp_path: Path) -> None:
    quiet = [{"codec": codec} for codec in ("raw", "plane", "int8", "k6v4", "k4v4", "k4v3", "cachegen")]
    for options in (*quiet, {"codec": "cachegen", "codec_level": 0}, {"codec": "cachegen", "codec_level": 1}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            coded.engine("raw", tiers=Tiers(MemoryStore(), **options).config).shutdown()
    with pytest.warns(CodecWarning, match=r"tiers\[0\]: codec = 'cachegen', codec_level = 2: cost a small model 4.7 %"):
        coded.engine("raw", tiers=("memory:x?codec=cachegen&codec_level=2",)).shutdown()
    with pytest.warns(CodecWarning, match=r"tiers\[0\] and tiers\[2\] have codecs with loss"):
        both = ("memory:x?codec=int8", "memory:y?codec=plane", "memory:z?codec=cachegen")
        coded.engine("raw", tiers=both).shutdown()
    tables_of(LATENT, np.random.default_rng(3)).save(tmp_path / "t", LATENT)
    pages = PagedCache(HostDevice(), [Tensor(HostDevice(), (4, T, 512)) for _ in range(L)], 0)
    with pytest.warns(CodecWarning, match="loss does to a latent was never measured"):
        pages.engine(codec_tables=str(tmp_path / "t"), tiers=("memory:x?codec=cachegen",)).shutdown()


def test_a_toml_file_says_it_too(coded: Coded, tmp_path: Path) -> None:
    file = tmp_path / "kv.toml"
    file.write_text(f'''
        device = "host"
        codec_tables = "{coded.path}"
        tiers = ["memory:a?codec=plane", {{url = "memory:b", codec = "cachegen", codec_level = 0}}, "memory:c"]
    ''')
    for config in (
        KVortexConfig.from_toml(file, cpu_pool_size_bytes=1 << 20),
        KVortexConfig.from_env({
            "KVORTEX_DEVICE": "host", "KVORTEX_CPU_POOL_SIZE_BYTES": "1MiB", "KVORTEX_CODEC_TABLES": str(coded.path),
            "KVORTEX_TIERS": "memory:a?codec=plane, memory:b?codec=cachegen&codec_level=0, memory:c",
        }),
    ):  # fmt: skip
        with KVortexEngine.create(config, coded.cache.layout) as engine:
            lines = engine._cascade.lines if engine._cascade else []
            seen = [(line.options.codec, line.options.codec_level, line.lossy) for line in lines]
            assert seen == [("plane", None, False), ("cachegen", 0, True), (None, None, False)]
            assert [stats.codec and stats.codec.codec for stats in engine.get_stats().tiers] == ["plane", "cachegen", None]


def test_lossless_tiers_share_keys_and_other_tiers_with_everybody(coded: Coded) -> None:
    names = set()
    for options in ({}, {"codec": "plane"}, {"codec": "cachegen"}, {"codec": "cachegen", "codec_level": 0}):
        with coded.engine("raw", tiers=Tiers(MemoryStore(), **options).config) as engine:
            names.add(engine.namespace.seed)
    assert len(names) == 3
    assert dataclasses.replace(TierOptions(codec="plane"), codec=None) == TierOptions()


def test_tools_know_of_codecs(coded: Coded) -> None:
    keys = keys_of(*range(4))
    for options in ("", "&codec=plane", "&codec=cachegen"):
        with coded.engine("raw", tiers=(f"memory:tools-of-codecs?{IN_URL}{options}",)) as engine:
            assert engine.save_blocks(keys, np.arange(4), first=True).wait().all() and engine.flush()
    url = "memory:tools-of-codecs?codec=cachegen"
    (seen,), (checked,) = tools.act("ls", url), tools.act("verify", url)
    assert seen["records"] == checked["right"] == 12 and len(seen["namespaces"]) == 3 and not checked["corrupt"]
    assert seen["codecs"] == ("cachegen: 4 records", "plane: 4 records", "raw: 4 records")
    assert tools.act("purge", url) and tools.act("ls", url)[0]["records"] == 0


def test_a_probe_says_what_is_wrong_with_a_codec(coded: Coded, tmp_path: Path) -> None:
    for entry in ("memory:probed?codec=cachegen", {"url": "memory:probed", "codec": "plane"}, f"disk:{tmp_path}?codec=plane"):
        assert tools.probe(entry, str(coded.path)).startswith("works")
        assert "does not work: codec = " in tools.probe(entry, None) and "codec_tables" in tools.probe(entry, None)
        assert "no file of codec tables" in tools.probe(entry, str(tmp_path / "none"))
    assert tools.probe("memory:probed?codec=raw").startswith("works") and H * D == 128
