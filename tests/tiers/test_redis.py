"""The Redis tier against real servers."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import redis

from kvortex.errors import ConfigError
from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.record import HEADER_BYTES, RecordFormat
from kvortex.tiers.redis import RedisOptions, RedisTier
from kvortex.tiers.redis.exchange import Exchange, Getting
from kvortex.tiers.redis.layout import body_bytes, body_name, head_name, names
from tests.tiers import servers
from tests.tiers.racks import FORMAT, NAMESPACE, Rack

SIZES = [2 << 20, 1 << 20, 4096, 65_536 + 17, 300, 129, 128, 64, 1, 100_000]
TOLERANCE = 2.0  # seconds that a call may come back after its deadline, on a busy machine
pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[tuple[int, servers.Server]]]:
    try:
        with servers.redis_cluster() as nodes:
            yield nodes
    except servers.Absent as error:
        pytest.skip(str(error))


@pytest.fixture
def client(redis_port: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_port) as client:
        client.flushall()
        yield client
        client.flushall()
        client.config_set("maxmemory", "256mb")
        client.config_set("proto-max-bulk-len", "512mb")


@pytest.fixture
def tier(redis_port: int, client: redis.Redis) -> Iterator[RedisTier]:
    tier = make(redis_port)
    yield tier
    tier.close()


def make(port: int, form: RecordFormat = FORMAT, **options: object) -> RedisTier:
    return RedisTier(RedisOptions(url=f"redis://127.0.0.1:{port}", **options), form)  # type: ignore[arg-type]


def strings(rack: Rack, at: int, namespace: bytes = NAMESPACE) -> tuple[bytes, bytes]:
    name = names(namespace, [rack.keys[at].tobytes()])[0]
    return head_name(name), body_name(name)


@pytest.mark.parametrize("connections", [1, 4])
def test_what_was_put_comes_back_to_another_tier(redis_port: int, client: redis.Redis, connections: int) -> None:
    rack = Rack(SIZES * 4)
    first = make(redis_port, connections=connections)
    assert not rack.has(first).any() and (rack.get(first).outcomes == Outcome.MISS).all()
    assert (rack.put(first) == Outcome.OK).all()
    assert rack.has(first).all()
    first.close()
    again = make(redis_port, connections=connections)
    fetched = rack.get(again)
    assert (fetched.outcomes == Outcome.OK).all() and (fetched.sizes == rack.sizes).all()
    assert (again.delete(rack.keys[:3], rack.call()) == Outcome.OK).all()
    assert (again.delete(rack.keys[:3], rack.call()) == Outcome.MISS).all()
    assert rack.has(again).tolist() == [False] * 3 + [True] * (len(rack.keys) - 3)
    assert rack.put(again).tolist() == [Outcome.OK] * len(rack.keys)  # those that were there, too
    again.close()
    again.close()
    assert rack.wrong_bytes == 0


def test_a_closed_tier_fails_and_does_not_connect(redis_port: int, tier: RedisTier) -> None:
    rack = Rack([4096])
    tier.close()
    assert rack.put(tier)[0] == rack.get(tier).outcomes[0] == Outcome.FAILED and rack.has(tier) is None


def test_a_probe_of_small_blocks(redis_port: int) -> None:
    """A tier takes no record that is larger than a block; nor does it look for one."""
    small = RedisTier(RedisOptions(url=f"redis://127.0.0.1:{redis_port}"), RecordFormat(NAMESPACE, 1000))
    assert small.probe(Call(time.monotonic() + 10)) is None
    small.close()


def test_no_key_is_no_request(tier: RedisTier) -> None:
    rack = Rack([])
    assert len(rack.put(tier)) == len(rack.get(tier).outcomes) == len(rack.has(tier)) == 0


def test_pipelines_are_capped_by_bytes(redis_port: int, client: redis.Redis) -> None:
    rack = Rack([1 << 20] * 8 + [256] * 600)
    tier = make(redis_port, connections=2, in_flight_bytes=1)
    assert (rack.put(tier) == Outcome.OK).all() and (rack.get(tier).outcomes == Outcome.OK).all() and rack.wrong_bytes == 0
    tier.close()


def test_two_strings_leave_no_memory_unused(client: redis.Redis, tier: RedisTier) -> None:
    if "jemalloc" not in client.info("memory")["mem_allocator"]:
        pytest.skip("this server takes its memory from another allocator than jemalloc")
    for size in (1 << 16, 1 << 20, 2 << 20, 3 << 20):
        rack = Rack([size])
        assert rack.put(tier)[0] == Outcome.OK
        taken = sum(client.memory_usage(name) for name in strings(rack, 0))
        assert taken < 1.01 * size + 1024
        client.set("whole", b"x" * (size + HEADER_BYTES))
        assert client.memory_usage("whole") > 1.16 * size  # what one string would take


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 255, 256, 257, 1000, 4096, 65_537, (2 << 20) - 1, 2 << 20, 3 << 20])
def test_a_payload_is_cut_within_itself(size: int) -> None:
    assert 0 <= body_bytes(size) <= max(0, size - 48) or size < 64
    assert size - body_bytes(size) <= 64 + size / 4


def test_two_namespaces_never_meet(redis_port: int, client: redis.Redis, tier: RedisTier) -> None:
    other_form = RecordFormat(bytes(32), FORMAT.most_bytes)
    twin_form = RecordFormat(NAMESPACE[:8] + bytes(24), FORMAT.most_bytes)  # with the same names in Redis
    other, twin = make(redis_port, other_form), make(redis_port, twin_form)
    rack = Rack([4096] * 4)
    rack.put(tier)
    assert not rack.has(other).any()
    assert (rack.get(other).outcomes == Outcome.MISS).all() and (rack.get(twin).outcomes == Outcome.MISS).all()
    assert (rack.get(tier).outcomes == Outcome.OK).all() and rack.wrong_bytes == 0
    other.close()
    twin.close()


def test_a_record_under_another_name_is_a_miss(client: redis.Redis, tier: RedisTier) -> None:
    rack = Rack([4096] * 2)
    rack.put(tier)
    for name, other in zip(strings(rack, 0), strings(rack, 1), strict=True):
        client.set(name, client.get(other))
    assert rack.get(tier).outcomes.tolist() == [Outcome.MISS, Outcome.OK] and rack.wrong_bytes == 0


def test_every_bit_of_a_record_counts(client: redis.Redis, tier: RedisTier) -> None:
    """Damaged, told so, dropped, and stored again."""
    rack = Rack([777])
    rng = np.random.default_rng(3)
    for part in (0, 1):
        rack.put(tier)
        whole = client.get(strings(rack, 0)[part])
        places = range(8 * len(whole)) if part == 0 else rng.choice(8 * len(whole), 500, replace=False)
        for bit in map(int, places):
            rack.put(tier)
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            client.set(strings(rack, 0)[part], bytes(damaged))
            outcome = rack.get(tier).outcomes[0]
            # A damaged magic, version or length of the header is somebody else's record.
            is_ours = part == 1 or bit >= 96
            assert outcome == (Outcome.CORRUPT if is_ours else Outcome.MISS)
            assert bool(client.exists(*strings(rack, 0))) != is_ours
    assert rack.wrong_bytes == 0


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("change", ["empty", "shorter", "longer", "gone", "foreign", "list", "older", "much longer"])
def test_what_is_no_whole_record_is_not_handed_out(client: redis.Redis, tier: RedisTier, part: int, change: str) -> None:
    rack = Rack([70_000, 4096, 300])
    rack.put(tier)
    name = strings(rack, 1)[part]
    whole = client.get(name)
    if change == "list":
        client.delete(name)
        client.rpush(name, b"1")
    elif change == "gone":
        client.delete(name)
    else:
        older = whole[:8] + b"\0\0" + whole[10:]
        changed = {"empty": b"", "shorter": whole[:-1], "longer": whole + b"x", "foreign": b"hello", "older": older}
        client.set(name, changed.get(change, whole + bytes(5 << 20)))
    outcomes = rack.get(tier).outcomes
    misses = {"gone", "list"} | ({"empty", "foreign", "older"} if part == 0 else set())
    assert outcomes.tolist() == [Outcome.OK, Outcome.MISS if change in misses else Outcome.CORRUPT, Outcome.OK]
    if change == "gone":
        assert rack.has(tier).tolist() == [True, False, True]
    assert rack.put(tier).tolist() == [Outcome.OK] * 3 and rack.get(tier).outcomes.tolist() == [Outcome.OK] * 3
    assert rack.wrong_bytes == 0


def test_a_larger_record_than_the_slot_is_a_miss(tier: RedisTier) -> None:
    rack = Rack([8192, 8192])
    rack.put(tier)
    fetched = tier.get_into(rack.keys, rack.targets, np.array([8192, 8191]), rack.call())
    assert fetched.outcomes.tolist() == [Outcome.OK, Outcome.MISS] and fetched.sizes.tolist() == [8192, 0]


def test_a_full_server_is_full(client: redis.Redis, tier: RedisTier) -> None:
    rack = Rack([1 << 20] * 24)
    client.config_set("maxmemory", str(client.info("memory")["used_memory"] + (9 << 20)))
    outcomes = rack.put(tier)
    assert set(outcomes.tolist()) == {Outcome.OK, Outcome.FULL} and "OOM" in tier.trouble
    found = rack.get(tier).outcomes
    assert (found[outcomes == Outcome.OK] == Outcome.OK).all() and (found[outcomes != Outcome.OK] == Outcome.MISS).all()
    client.config_set("maxmemory", "256mb")
    assert (rack.put(tier) == Outcome.OK).all() and rack.wrong_bytes == 0


def test_an_evicting_server_forgets_whole_records(client: redis.Redis, tier: RedisTier) -> None:
    rack = Rack([1 << 20] * 24)
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", str(client.info("memory")["used_memory"] + (9 << 20)))
    try:
        assert (rack.put(tier) == Outcome.OK).all()
        found = rack.get(tier).outcomes
        assert set(found.tolist()) == {Outcome.OK, Outcome.MISS} and rack.wrong_bytes == 0
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_values_that_the_server_does_not_take_are_too_large(redis_port: int, client: redis.Redis) -> None:
    client.config_set("proto-max-bulk-len", "1mb")
    tier = make(redis_port)
    rack = Rack([2 << 20, 1 << 20, 4096])
    assert rack.put(tier).tolist() == [Outcome.TOO_LARGE, Outcome.OK, Outcome.OK]
    assert rack.get(tier).outcomes.tolist() == [Outcome.MISS, Outcome.OK, Outcome.OK] and rack.wrong_bytes == 0
    tier.close()


def test_records_live_for_their_ttl(redis_port: int, client: redis.Redis) -> None:
    rack = Rack([4096])
    plain, renewing = make(redis_port, ttl_s=100), make(redis_port, ttl_s=100, renew_ttl=True)
    rack.put(plain)
    for name in strings(rack, 0):
        assert 90 < client.ttl(name) <= 100
        client.expire(name, 50)
    assert rack.get(plain).outcomes[0] == Outcome.OK
    assert all(client.ttl(name) <= 50 for name in strings(rack, 0))
    assert rack.get(renewing).outcomes[0] == Outcome.OK and rack.wrong_bytes == 0
    assert all(client.ttl(name) > 90 for name in strings(rack, 0))
    plain.close()
    renewing.close()


def test_tiers_share_a_store(redis_port: int, client: redis.Redis) -> None:
    """Eight threads with four tiers put, get and delete the same records."""
    tiers = [make(redis_port, connections=2) for _ in range(4)]
    racks = [Rack([4096, 70_000, 300] * 5) for _ in range(8)]
    failures: list[str] = []

    def work(at: int) -> None:
        rng = np.random.default_rng(at)
        rack, tier = racks[at], tiers[at % 4]
        for _ in range(30):
            some = rng.choice(15, rng.integers(1, 15), replace=False)
            outcomes = (rack.put, rack.get, lambda t, s: t.delete(rack.keys[s], rack.call()))[rng.integers(3)](tier, some)
            outcomes = getattr(outcomes, "outcomes", outcomes)
            if not set(outcomes.tolist()) <= {Outcome.OK, Outcome.MISS}:
                failures.append(f"{outcomes} {tier.trouble}")

    threads = [threading.Thread(target=work, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tier in tiers:
        tier.close()
    assert not failures and sum(rack.wrong_bytes for rack in racks) == 0


def test_a_paused_server_is_waited_for_until_the_deadline() -> None:
    rack = Rack([70_000] * 4)
    with servers.redis_server() as (port, server):
        tier = make(port)
        rack.put(tier)
        server.pause()
        started = time.monotonic()
        assert (rack.get(tier, seconds=0.3).outcomes == Outcome.TIMEOUT).all()
        assert (rack.put(tier, seconds=0.3) == Outcome.TIMEOUT).all()
        assert rack.has(tier, seconds=0.3) is None
        assert (tier.delete(rack.keys, rack.call(0.3)) == Outcome.TIMEOUT).all()
        assert tier.probe(rack.call(0.3)) is not None
        assert time.monotonic() - started > 1.5 and rack.latest < TOLERANCE
        server.resume()  # and it does what it was asked for meanwhile, the deletion too
        assert tier.probe(rack.call()) is None
        assert (rack.put(tier) == Outcome.OK).all()
        assert rack.has(tier).all() and (rack.get(tier).outcomes == Outcome.OK).all()
        tier.close()
    assert rack.wrong_bytes == 0


def test_a_call_can_be_cancelled_while_it_waits() -> None:
    rack = Rack([4096] * 4)
    with servers.redis_server() as (port, server):
        tier = make(port)
        rack.put(tier)
        server.pause()
        end = time.monotonic() + 0.3
        call = Call(time.monotonic() + 30, lambda: time.monotonic() > end)
        fetched = tier.get_into(rack.keys, rack.targets, rack.sizes, call)
        assert (fetched.outcomes == Outcome.CANCELLED).all() and time.monotonic() < end + 2
        server.resume()
        cancelled = Call(time.monotonic() + 30, lambda: True)
        assert (tier.get_into(rack.keys, rack.targets, rack.sizes, cancelled).outcomes == Outcome.CANCELLED).all()
        assert (rack.get(tier).outcomes == Outcome.OK).all() and rack.wrong_bytes == 0
        tier.close()


def test_a_passed_deadline_costs_nothing(tier: RedisTier) -> None:
    rack = Rack([4096])
    assert rack.put(tier, seconds=0)[0] == rack.get(tier, seconds=0).outcomes[0] == Outcome.TIMEOUT


def test_a_killed_server_fails_and_serves_again_when_it_is_back() -> None:
    rack = Rack([1 << 20] * 8)
    port = servers.free_port()
    with servers.redis_server(port=port) as (_, server):
        tier = make(port)
        assert (rack.put(tier) == Outcome.OK).all()
        killer = threading.Timer(0.002, server.stop)
        killer.start()
        seen = set()
        for _ in range(50):
            seen |= set(rack.get(tier, seconds=2).outcomes.tolist())
            if not killer.is_alive():
                break
        killer.join()
        assert seen <= {Outcome.OK, Outcome.FAILED}
        started = time.monotonic()
        assert (rack.put(tier, seconds=5) == Outcome.FAILED).all() and "connecting" in tier.trouble
        assert time.monotonic() - started < 3
    with servers.redis_server(port=port):
        assert (rack.get(tier).outcomes == Outcome.MISS).all()
        assert (rack.put(tier) == Outcome.OK).all() and (rack.get(tier).outcomes == Outcome.OK).all()
        tier.close()
    assert rack.wrong_bytes == 0 and rack.latest < TOLERANCE


def test_connections_that_the_server_hung_up_on_are_no_failure(client: redis.Redis, tier: RedisTier) -> None:
    rack = Rack([4096] * 4)
    rack.put(tier)
    client.client_kill_filter(_type="normal", skipme=True)
    assert (rack.get(tier).outcomes == Outcome.OK).all()


def test_passwords_and_databases(nothing_leaks: None) -> None:
    rack = Rack([4096])
    with servers.redis_server("--requirepass", "s3cr3t/&%") as (port, _):
        good = RedisTier(RedisOptions(url=f"redis://:s3cr3t%2F%26%25@127.0.0.1:{port}/3"), FORMAT)
        assert rack.put(good)[0] == Outcome.OK and rack.get(good).outcomes[0] == Outcome.OK
        with redis.Redis(port=port, password="s3cr3t/&%", db=3) as client:
            assert client.dbsize() == 2
        for url in (f"redis://:wr0ng@127.0.0.1:{port}", f"redis://127.0.0.1:{port}"):
            bad = RedisTier(RedisOptions(url=url), FORMAT)
            assert rack.put(bad)[0] == Outcome.FAILED and rack.get(bad).outcomes[0] == Outcome.FAILED
            said = f"{bad.trouble} {bad.probe(rack.call())} {bad.options!r}"
            assert "wr0ng" not in said and ("WRONGPASS" in said or "NOAUTH" in said)
            bad.close()
        good.close()


def test_a_socket_of_the_file_system() -> None:
    rack = Rack([1 << 20, 300])
    import tempfile

    with tempfile.TemporaryDirectory() as folder, servers.redis_server("--unixsocket", f"{folder}/redis.sock"):
        tier = RedisTier(RedisOptions(url=f"unix://{folder}/redis.sock"), FORMAT)
        assert (rack.put(tier) == Outcome.OK).all() and (rack.get(tier).outcomes == Outcome.OK).all()
        tier.close()
    assert rack.wrong_bytes == 0


def test_a_forked_process_makes_its_own_connections(tier: RedisTier) -> None:
    rack = Rack([4096] * 300)
    rack.put(tier)
    child = os.fork()
    if not child:
        os._exit(0 if (rack.get(tier).outcomes == Outcome.OK).all() and not rack.wrong_bytes else 1)
    assert (rack.get(tier).outcomes == Outcome.OK).all() and rack.wrong_bytes == 0
    assert os.waitpid(child, 0)[1] == 0
    assert (rack.get(tier).outcomes == Outcome.OK).all()


@pytest.mark.parametrize(
    "options",
    [{"url": "http://h"}, {"url": 3}, {"ttl_s": 0}, {"ttl_s": True}, {"renew_ttl": True}, {"renew_ttl": 1, "ttl_s": 3},
     {"connections": 0}, {"in_flight_bytes": 0.5}, {"connect_timeout_s": 0}],
)  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RedisOptions(**options)  # type: ignore[arg-type]


def test_urls_that_cannot_be_used_are_refused_without_their_secrets() -> None:
    for url in ("redis://:hunter2@host:port/1", "redis://:hunter2@host/1?nonsense=1", "redis://u:hunter2@h:99999999",
                "redis://:hunter2/more@host:1", "redis://:hunter2?more@host:1", "redis://u:hunter2#more@host", "redis://[hunter2",
                "redis://:hunter2/0"):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            RedisTier(RedisOptions(url=url), FORMAT)
        assert "hunter2" not in str(error.value)
        with contextlib.suppress(ConfigError):  # some are refused by the options already
            assert "hunter2" not in repr(RedisOptions(url=url))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(ConfigError, match="extra redis"):
        RedisTier(RedisOptions(), FORMAT)


def test_a_cluster_shares_a_batch(cluster: list[tuple[int, servers.Server]]) -> None:
    rack = Rack(SIZES * 6)
    for port, _ in cluster[:2]:
        tier = make(port)
        assert (rack.put(tier) == Outcome.OK).all() and rack.has(tier).all()
        assert (rack.get(tier).outcomes == Outcome.OK).all() and tier.probe(rack.call()) is None
        tier.close()
    counts = []
    for port, _ in cluster:
        with redis.Redis(port=port) as client:
            counts.append(client.dbsize())
    assert min(counts) > 10 and sum(counts) == 2 * len(rack.keys) and rack.wrong_bytes == 0


def test_moved_slots_are_followed(cluster: list[tuple[int, servers.Server]]) -> None:
    """Slots change hands between two calls; and one is on its way, so that its server asks to ask the other."""
    rack = Rack([4096] * 40, seed=8)
    tier = make(cluster[0][0])
    rack.put(tier)
    clients = [redis.Redis(port=port) for port, _ in cluster]
    ids = [client.execute_command("CLUSTER MYID").decode() for client in clients]
    slots = [client_slot(clients[0], strings(rack, at)[0]) for at in range(40)]
    move = [at for at in range(40) if slots[at] <= 16384 // 3][:3]
    assert len(move) == 3
    settled, migrating = move[:2], move[2]
    for at in settled:
        _migrate(clients, ids, slots[at], strings(rack, at), cluster[1][0])
        for client in clients:
            client.execute_command("CLUSTER SETSLOT", slots[at], "NODE", ids[1])
    _migrate(clients, ids, slots[migrating], strings(rack, migrating), cluster[1][0])
    try:
        found = rack.get(tier).outcomes
        assert (found == Outcome.OK).all(), (found, tier.trouble)
        assert (rack.put(tier) == Outcome.OK).all() and (rack.get(tier).outcomes == Outcome.OK).all()
    finally:
        for client in clients:
            client.execute_command("CLUSTER SETSLOT", slots[migrating], "NODE", ids[1])
            client.close()
    assert (rack.get(tier).outcomes == Outcome.OK).all() and rack.wrong_bytes == 0
    tier.close()


def client_slot(client: redis.Redis, name: bytes) -> int:
    return int(client.execute_command("CLUSTER KEYSLOT", name))


def _migrate(clients: list[redis.Redis], ids: list[str], slot: int, moved: tuple[bytes, ...], port: int) -> None:
    clients[1].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
    clients[0].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
    clients[0].execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5000, "KEYS", *moved)


def test_a_dead_server_of_a_cluster_costs_only_its_own_keys() -> None:
    rack = Rack([4096] * 60, seed=9)
    try:
        with servers.redis_cluster() as nodes:
            tier = make(nodes[0][0])
            assert (rack.put(tier) == Outcome.OK).all()
            nodes[1][1].stop()
            found = rack.get(tier, seconds=5).outcomes
            assert {Outcome.OK, Outcome.FAILED} == set(found.tolist()) and 5 < (found == Outcome.OK).sum() < 55
            again = rack.put(tier, seconds=5)
            assert ((again == Outcome.OK) == (found == Outcome.OK)).all()
            tier.close()
    except servers.Absent as error:
        pytest.skip(str(error))
    assert rack.wrong_bytes == 0 and rack.latest < TOLERANCE


def test_a_record_that_is_just_being_replaced_is_read_again(
    tier: RedisTier, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an engine whose block of that key has other bits: its two strings are two commands, and this reads between them."""
    rack, theirs = Rack([1000, 4096, 300]), Rack([1000, 4096, 300], seed=2)
    theirs.keys = rack.keys
    assert (rack.put(tier) == Outcome.OK).all()
    bodies = [body_name(name) for name in names(NAMESPACE, [key.tobytes() for key in rack.keys])]
    mine = client.mget(bodies)
    assert (theirs.put(tier) == Outcome.OK).all()
    client.mset(dict(zip(bodies[:2], mine[:2], strict=True)))
    run = tier._run

    def settled(exchange: Exchange, call: Call) -> None:
        run(exchange, call)
        if isinstance(exchange, Getting):
            assert (theirs.put(other) == Outcome.OK).all()

    other = make(int(client.connection_pool.connection_kwargs["port"]))
    monkeypatch.setattr(tier, "_run", settled)
    assert (theirs.get(tier).outcomes == Outcome.OK).all() and not theirs.wrong_bytes
    other.close()
    client.mset(dict(zip(bodies[:2], mine[:2], strict=True)))
    monkeypatch.setattr(tier, "_run", run)
    assert theirs.get(tier).outcomes.tolist() == [Outcome.CORRUPT, Outcome.CORRUPT, Outcome.OK]
    assert client.exists(*bodies[:2]) == 0 and client.exists(bodies[2])
