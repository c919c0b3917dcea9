"""Engines on real stores, named by URL: what one writes another reads back exact, and no other namespace ever sees it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex import ConfigError, KVortexConfig, KVortexEngine
from kvortex.cli import main
from kvortex.devices import HostDevice
from kvortex.tiers import tools
from tests.engine.coded import Coded
from tests.engine.tiered import nothing_is_held, save, until
from tests.pages import PagedCache, assert_same, keys_of
from tests.tiers import servers

_PATIENT = "read_timeout_s=20&write_timeout_s=20&breaker_slow_s=20&breaker_lost_s=60&absent_s=0.01"  # of a busy machine


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """A Redis that wants a password."""
    try:
        with servers.redis_server("--requirepass", "hunter2") as (port, _):
            yield f"redis://:hunter2@127.0.0.1:{port}/0?ttl_s=600&{_PATIENT}"
    except servers.Absent as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cluster_url() -> Iterator[str]:
    try:
        with servers.redis_cluster() as nodes:
            yield f"redis://127.0.0.1:{nodes[1][0]}?{_PATIENT}"
    except servers.Absent as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    try:
        with servers.moto_server() as (endpoint, _):
            login = f"access_key_id={servers.S3_KEY}&secret_access_key={servers.S3_SECRET}&region=us-east-1"
            yield f"s3://{servers.S3_BUCKET}/blocks?endpoint={endpoint}&{login}&{_PATIENT}"
    except servers.Absent as error:
        pytest.skip(str(error))


@pytest.fixture(params=["disk", "two disks", "redis", "cluster", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each store by its URL."""
    if "disk" in request.param:
        folders = [tmp_path / "a", tmp_path / "b"][: 2 if "two" in request.param else 1]
        return f"disk:{','.join(map(str, folders))}?capacity=4MiB&{_PATIENT}"
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(params=["redis", "cluster", "s3"])
def shared_url(request: pytest.FixtureRequest) -> str:
    """Those that several engines may have at a time; a disk's folder is one engine's."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A namespace of this test alone: servers are shared."""
    return request.node.name


def cache_of(seed: int = 7) -> PagedCache:
    cache = PagedCache.plain(HostDevice())
    cache.rng = np.random.default_rng(seed)
    return cache


def written(cache: PagedCache, url: str, count: int, **options: Any) -> list[np.ndarray]:
    """What the pages held that were saved under their own numbers, and written to the store."""
    before = cache.randomize()
    with cache.engine(slots=16, tiers=(url,), **options) as engine:
        save(engine, cache, keys_of(*range(count)), np.arange(count))
        assert engine.flush(60)
        assert dict(engine.get_stats().tiers[0].dropped) == {}
    return before


def test_a_restarted_engine_reads_back_exact(url: str, model: str) -> None:
    cache = cache_of()
    before = written(cache, url, 12, model=model)
    for digests in (True, False, True):  # whoever reads
        poisoned = cache.randomize()
        with cache.engine(slots=4, tiers=(url,), model=model, digests=digests) as engine:
            assert engine.check_blocks(keys_of(*range(12), 99), timeout=60).tolist() == [True] * 12 + [False]
            for first in range(0, 12, 4):
                ticket = engine.load_blocks(keys_of(*range(first, first + 4)), np.arange(12 + first, 16 + first))
                assert ticket.wait(60).all() and ticket.error is None
            assert not engine.load_blocks(keys_of(99), [3]).wait(60).any()
            assert_same(cache.memory(), cache.expected(poisoned, before, [(at, 12 + at) for at in range(12)]))
            assert engine.get_stats().tiers[0].promoted_blocks == 12 and not engine.get_stats().corrupt_blocks
            nothing_is_held(engine)


def test_what_engines_without_digests_wrote_is_checked_by_those_with(url: str, model: str) -> None:
    cache = cache_of()
    before = written(cache, url, 6, model=model, digests=False)
    poisoned = cache.randomize()
    with cache.engine(slots=8, tiers=(url,), model=model) as engine:
        assert engine.load_blocks(keys_of(*range(6)), np.arange(10, 16)).wait(60).all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(at, 10 + at) for at in range(6)]))
        assert not engine.get_stats().corrupt_blocks


@pytest.mark.parametrize(("pool", "codec"), [("raw", "plane"), ("plane", "cachegen"), ("plane", None)])
def test_coded_records_come_back(pool: str, codec: str | None, url: str, model: str, tmp_path: Path) -> None:
    """Exact, or equal to what the codec itself makes of them; first blocks exact; and in fewer bytes."""
    coded, keys, chosen = Coded.make(tmp_path), keys_of(*range(6)), url + (f"&codec={codec}" if codec else "")
    with coded.engine(pool, tiers=(chosen,), model=model) as engine:
        assert engine.save_blocks(keys, np.arange(6), first=True).wait().all() and engine.flush(60)
        stats = engine.get_stats().tiers[0]
        assert not stats.dropped and stats.codec is not None and stats.codec.encoded_blocks == 6
        assert stats.codec.encoded_to_bytes < stats.codec.encoded_from_bytes and stats.of("put").outcomes.keys() == {"ok"}
        assert stats.codec.encoded_to_bytes == stats.of("put").nbytes
    with coded.engine(pool, tiers=(chosen,), model=model) as engine:
        assert engine.check_blocks(keys, first=True, timeout=60).all()
        assert engine.load_blocks(keys, np.arange(6, 12), first=True).wait(60).all()
        for at in range(6):
            assert (coded.read(6 + at) == coded.expected(codec or pool, coded.records[at], at == 0)).all()
        assert not engine.get_stats().tiers[0].codec.refused  # type: ignore[union-attr]
        nothing_is_held(engine)
    if "cluster" not in url:
        for facts in tools.act("verify", chosen):
            assert facts["right"] > 0 and not facts["corrupt"]
        assert any(name.startswith(f"{codec or pool}: ") for facts in tools.act("ls", chosen) for name in facts["codecs"])


def test_layers_saved_one_by_one_come_back_exact(url: str, model: str) -> None:
    cache = cache_of()
    before = cache.randomize()
    with cache.engine(tiers=(url,), model=model) as engine:
        ticket = engine.save_blocks(keys_of(*range(5)), np.arange(5), layerwise=True)
        for layer in reversed(range(cache.layout.num_layers)):
            ticket.save_layer(layer)
        assert ticket.wait().all()
    poisoned = cache.randomize()
    with cache.engine(tiers=(url,), model=model) as engine:
        assert engine.load_blocks(keys_of(*range(5)), np.arange(10, 15), layerwise=True).wait(60).all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(at, 10 + at) for at in range(5)]))


def test_buffers_of_any_length_come_back_exact(url: str, model: str) -> None:
    sizes = np.array([1, 7, 4095, 4096, 4097, 10_000, 16_384])
    starts = np.concatenate(([0], np.cumsum(sizes + 3)[:-1]))
    device, keys = HostDevice(), keys_of(*range(len(sizes)))
    source, target = device.allocate(40_000 + 100), device.allocate(40_000 + 100)
    memory = np.random.default_rng(3).integers(0, 256, source.nbytes, np.uint8)
    source.write(memory)
    config = KVortexConfig(cpu_pool_size_bytes=16 << 14, max_block_bytes=16_384, device="host", tiers=(url,), model=model)
    with KVortexEngine.create(config) as engine:
        assert engine.save_blocks(keys, source.address + starts, sizes).wait().all()
    with KVortexEngine.create(config) as engine:
        assert not engine.load_blocks(keys[:1], target.address + starts[:1], sizes[:1] + 1).wait(60).any()
        assert engine.load_blocks(keys, target.address + starts, sizes).wait(60).all()
    wanted = np.zeros_like(memory)
    seen = target.read()
    for at, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        wanted[at : at + size] = memory[at : at + size]
        assert (seen[at : at + size] == wanted[at : at + size]).all()


def test_two_engines_share_a_store_at_the_same_time(shared_url: str, model: str) -> None:
    """Each writes half, and all the while reads what the other writes; keys of both are written by both."""
    caches = [cache_of(), cache_of()]
    before = caches[0].randomize()
    for tensor, bytes_there in zip(caches[1].tensors, before, strict=True):
        tensor.buffer.write(bytes_there)
    errors: list[BaseException] = []
    meet = threading.Barrier(2)

    def work(mine: int) -> None:
        cache, other = caches[mine], 1 - mine
        try:
            with cache.engine(slots=6, tiers=(shared_url,), model=model) as engine:
                for turn in range(3):
                    base = 8 * turn
                    save(engine, cache, keys_of(*range(base + 3 * mine, base + 5 + 3 * mine)),
                         np.arange(base + 3 * mine, base + 5 + 3 * mine))  # fmt: skip
                    assert engine.flush(60)
                    meet.wait(120)
                    wanted = np.arange(base + 3 * other, base + 5 + 3 * other)
                    cache_pages(cache, wanted)
                    until(lambda w=wanted: engine.load_blocks(keys_of(*w.tolist()), w).wait(60).all(), 60)  # type: ignore[misc]
                    meet.wait(120)
                nothing_is_held(engine)
                assert not engine.get_stats().corrupt_blocks
        except BaseException as error:
            errors.append(error)
            meet.abort()

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for cache in caches:
        assert_same(cache.memory(), before)


def cache_pages(cache: PagedCache, pages: np.ndarray) -> None:
    """Poisons pages, so that only a load can make them right."""
    for tensor in cache.tensors:
        memory = tensor.buffer.read()
        tensor.view(memory)[:, pages] ^= 0xA5
        tensor.buffer.write(memory)


NAMESPACES = [{"model": "other"}, {"dtype": "fp8"}, {"salt": "s"}, {"lora": "l"}, {"world_size": 2}, {"block_size": 32}]


@pytest.mark.parametrize("other", NAMESPACES, ids=str)
def test_two_namespaces_never_meet(shared_url: str, other: dict[str, Any], model: str) -> None:
    cache = cache_of()
    before = written(cache, shared_url, 4, model=model)
    poisoned = cache.randomize()
    options = {"model": model} | other
    with cache.engine(tiers=(shared_url,), **options) as engine:
        assert not engine.check_blocks(keys_of(*range(4)), timeout=60).any()
        assert not engine.load_blocks(keys_of(*range(4)), np.arange(10, 14)).wait(60).any()
        assert_same(cache.memory(), poisoned)
        save(engine, cache, keys_of(*range(4)), np.arange(4))
    with cache.engine(tiers=(shared_url,), model=model) as engine:
        assert engine.load_blocks(keys_of(*range(4)), np.arange(10, 14)).wait(60).all()
        assert_same(cache.memory(), cache.expected(poisoned, before, [(at, 10 + at) for at in range(4)]))


def test_a_disk_of_another_namespace_is_refused(tmp_path: Path) -> None:
    cache, url = cache_of(), f"disk:{tmp_path}?capacity=4MiB"
    written(cache, url, 4, model="a")
    with pytest.raises(ConfigError, match="namespace"):
        cache.engine(tiers=(url,), model="b")
    with cache.engine(tiers=(url + "&reset=yes",), model="b") as engine:
        assert not engine.load_blocks(keys_of(*range(4)), np.arange(10, 14)).wait(60).any()


def test_a_disk_that_another_engine_has_is_refused(tmp_path: Path) -> None:
    cache, url = cache_of(), f"disk:{tmp_path}?capacity=4MiB"
    with cache.engine(tiers=(url,)), pytest.raises(ConfigError, match="use"):
        cache.engine(tiers=(url,))
    with pytest.raises(ConfigError, match="use"):
        cache.engine(tiers=(url, url))
    with cache.engine(tiers=(url,)):
        pass


def test_a_disk_above_a_store(tmp_path: Path, redis_url: str, model: str) -> None:
    """What the disk has lost comes from below, and is written to the disk again."""
    cache, disk = cache_of(), f"disk:{tmp_path}?capacity=4MiB&{_PATIENT}"
    before = cache.randomize()
    with cache.engine(tiers=(disk, redis_url), model=model) as engine:
        save(engine, cache, keys_of(*range(6)), np.arange(6))
    assert main(["tier", "purge", disk, "--yes"]) == 0
    poisoned = cache.randomize()
    for tiers in ((disk, redis_url), (disk,)):
        with cache.engine(tiers=tiers, model=model) as engine:
            assert engine.load_blocks(keys_of(*range(6)), np.arange(10, 16)).wait(60).all()
            assert engine.get_stats().tiers[-1].promoted_blocks == 6
        assert_same(cache.memory(), cache.expected(poisoned, before, [(at, 10 + at) for at in range(6)]))


def test_the_commands_on_a_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, url = cache_of(), f"disk:{tmp_path}/kv?capacity=4MiB"
    written(cache, url, 5)
    assert main(["tier", "ls", url, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["records"] == 5 and found["payload_bytes"] == 5 * cache.layout.record_bytes and found["closed"]
    assert main(["tier", "verify", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["right"] == 5
    with cache.engine(tiers=(url,)):
        assert main(["tier", "purge", url, "--yes"]) == 2
        assert tools.probe(url).startswith("works")
    assert main(["tier", "purge", url, "--yes", "--json"]) == 0
    capsys.readouterr()
    assert main(["tier", "ls", url]) == 2


def test_what_a_small_disk_has_evicted_is_known_at_once_and_written_again(tmp_path: Path) -> None:
    cache, url = cache_of(), f"disk:{tmp_path}?capacity=160KiB&{_PATIENT}"
    before = cache.randomize()
    with cache.engine(slots=4, tiers=(url,)) as engine:
        for at in range(16):
            save(engine, cache, keys_of(at), [at])
            assert engine.flush(60)
        assert engine.get_stats().tiers[0].evictions
        assert engine.check_blocks(keys_of(0, 15)).tolist() == [False, True]
        save(engine, cache, keys_of(0), [0])
    poisoned = cache.randomize()
    with cache.engine(slots=4, tiers=(url,)) as engine:
        assert engine.load_blocks(keys_of(0), [20]).wait(60).all()
    assert_same(cache.memory(), cache.expected(poisoned, before, [(0, 20)]))


def test_the_commands_on_a_store(shared_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    cache = cache_of()
    assert main(["tier", "purge", shared_url, "--yes"]) == 0
    written(cache, shared_url, 5)
    said = ""
    for action, wanted in (
        (["ls"], {"records": 5, "payload_bytes": 5 * cache.layout.record_bytes, "others": 0}),
        (["verify"], {"right": 5, "corrupt": 0, "incomplete": 0}),
        (["purge", "--yes"], {}),
        (["ls"], {"records": 0, "others": 0}),
    ):
        capsys.readouterr()
        assert main(["tier", action[0], shared_url, *action[1:], "--json"]) == 0
        said += (out := capsys.readouterr().out)
        assert wanted.items() <= json.loads(out)[0].items()
    assert "hunter2" not in said and servers.S3_SECRET not in said


def test_the_doctor_probes_each(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvortex.cli import probes

    monkeypatch.setenv("KVORTEX_TIERS", url)
    (said,) = probes.tiers().items()
    assert str(said[1]).startswith("works"), said
    assert "hunter2" not in str(said) and servers.S3_SECRET not in str(said)


def test_each_by_the_environment_and_by_toml(url: str, model: str, tmp_path: Path) -> None:
    cache = cache_of()
    before = cache.randomize()
    common = {"device": "host", "model": model, "cpu_pool_size_bytes": 16 * 16384}
    with KVortexEngine.create(KVortexConfig.from_env({"KVORTEX_TIERS": url}, **common), cache.layout) as engine:
        save(engine, cache, keys_of(1), [1])
    poisoned = cache.randomize()
    bare, _, query = url.partition("?")
    table = "".join(f"{name} = {json.dumps(value)}\n" for name, value in (pair.split("=", 1) for pair in query.split("&")))
    file = tmp_path / "kvortex.toml"
    file.write_text(f"[kvortex]\n[[kvortex.tiers]]\nurl = {json.dumps(bare)}\n{table}")
    with KVortexEngine.create(KVortexConfig.from_toml(file, **common), cache.layout) as engine:
        assert engine.load_blocks(keys_of(1), [2]).wait(60).all()
    assert_same(cache.memory(), cache.expected(poisoned, before, [(1, 2)]))


_KILLED = """
import sys
import numpy as np
from kvortex.devices import HostDevice
from tests.pages import PagedCache, keys_of

cache = PagedCache.plain(HostDevice())
cache.randomize()
with cache.engine(slots=8, tiers=(sys.argv[1],)) as engine:
    for turn in range(10**9):
        pages = np.arange(24)[turn % 4 :: 4]
        engine.save_blocks(keys_of(*(24 * (turn // 4) + pages).tolist()), pages).wait()
        if turn <= 3:  # before others take the slots
            assert engine.flush() and (turn < 3 or print("flushed", flush=True) is None)
"""


def test_an_engine_that_was_killed_leaves_what_it_had_flushed_and_nothing_wrong(tmp_path: Path) -> None:
    """It writes the same pages under ever new keys when it is killed."""
    url = f"disk:{tmp_path}?capacity=64MiB&{_PATIENT}"
    cache, seen = cache_of(), 0
    before = cache.randomize()  # as the other process has it
    for turn in range(3):
        command = [sys.executable, "-c", _KILLED, url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout is not None and process.stdout.readline() == b"flushed\n"
            time.sleep(0.05 * turn)
            process.kill()
        with cache.engine(slots=30, tiers=(url,)) as engine:
            there = np.flatnonzero(engine.check_blocks(keys_of(*range(2400))))
            assert there[:24].tolist() == list(range(24))
            for first in range(0, len(there), 24):
                poisoned, part = cache.randomize(), there[first : first + 24].tolist()
                assert engine.load_blocks(keys_of(*part), np.arange(len(part))).wait(60).all()
                assert_same(cache.memory(), cache.expected(poisoned, before, [(key % 24, at) for at, key in enumerate(part)]))
            seen = max(seen, len(there))
            assert not engine.get_stats().tiers[0].corrupt
    assert seen > 24


def test_a_server_that_stops_is_left_alone_and_serves_again(model: str) -> None:
    try:
        with servers.redis_server() as (port, server):
            quick = "read_timeout_s=0.3&write_timeout_s=0.3&absent_s=0.05&breaker_failures=1&breaker_pause_s=0.1"
            cache, url = cache_of(), f"redis://127.0.0.1:{port}?{quick}"
            before = cache.randomize()
            with cache.engine(slots=4, tiers=(url,), model=model) as engine:
                line = engine._cascade.lines[0]
                until(lambda: save_all(engine, line, 8), 60)
                server.pause()
                began = time.monotonic()
                assert not engine.load_blocks(keys_of(0), [20]).wait(30).any()
                until(lambda: not line.breaker.closed)
                save(engine, cache, keys_of(*range(100, 104)), np.arange(4))  # and the pool is nobody else's
                assert time.monotonic() - began < 10
                server.resume()
                until(lambda: line.breaker.closed, 60)
                poisoned = cache.randomize()
                until(lambda: engine.load_blocks(keys_of(0), [20]).wait(30).all(), 60)
                assert_same(cache.memory(), cache.expected(poisoned, before, [(0, 20)]))
                nothing_is_held(engine)
    except servers.Absent as error:
        pytest.skip(str(error))


def save_all(engine: KVortexEngine, line: Any, count: int) -> bool:
    """Blocks one by one, as a busy machine may need several times; whether the store has all of them."""
    if not line.breaker.closed:
        return False
    for at in range(count):
        engine.save_blocks(keys_of(at), [at]).wait()
        engine.flush(10)
    return bool(engine.check_blocks(keys_of(*range(count)), timeout=1).all())
