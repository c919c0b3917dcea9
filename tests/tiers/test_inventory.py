"""What stores hold, asked without an engine: counted, checked, removed; what is not kvortex's stays."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.errors import ConfigError
from kvortex.tiers import tools
from kvortex.tiers.base import Outcome, Tier
from kvortex.tiers.inventory import Name, list_records, verify_records
from kvortex.tiers.record import HEADER_BYTES, RecordFormat
from kvortex.tiers.redis import RedisOptions, RedisTier
from kvortex.tiers.redis.layout import body_name, head_name, names
from kvortex.tiers.s3 import S3Options, S3Tier
from tests.tiers import servers
from tests.tiers.racks import FORMAT, NAMESPACE, Rack

SIZES = [1, 4096, 300_000, 2 << 20, 0]
OTHER = RecordFormat(bytes(range(1, 33)), 1 << 20)


class Store:
    """A store, its URL, and a client to change things with behind the tier's back."""

    def __init__(self, url: str, open_tier: Callable[[RecordFormat], Tier], client: Any) -> None:
        self.url, self.open, self.client = url, open_tier, client


class Redis(Store):
    def flip(self, key: bytes, at: int) -> None:
        name = (head_name if at < HEADER_BYTES else body_name)(names(NAMESPACE, [key])[0])
        value = bytearray(self.client.get(name))
        value[at if at < HEADER_BYTES else 0] ^= 1
        self.client.set(name, bytes(value))

    def shorten(self, key: bytes) -> None:
        self.client.delete(body_name(names(NAMESPACE, [key])[0]))

    def put_other(self) -> None:
        self.client.set("somebody's", b"else")

    def others(self) -> list[bytes]:
        return list(self.client.scan_iter())


class S3(Store):
    def _path(self, key: bytes) -> str:
        return f"kvortex/{NAMESPACE.hex()}/{key.hex()[:2]}/{key.hex()}"

    def flip(self, key: bytes, at: int) -> None:
        import obstore

        value = bytearray(obstore.get(self.client, self._path(key)).bytes())
        value[at] ^= 1
        obstore.put(self.client, self._path(key), bytes(value))

    def put_other(self) -> None:
        import obstore

        obstore.put(self.client, "kvortex/somebody's", b"else")

    def others(self) -> list[bytes]:
        import obstore

        return [entry["path"].encode() for page in obstore.list(self.client) for entry in page]


@pytest.fixture
def redis_store(redis_port: int) -> Iterator[Redis]:
    import redis

    url = f"redis://127.0.0.1:{redis_port}/0"
    with redis.Redis(port=redis_port) as client:
        client.flushall()
        yield Redis(url, lambda form: RedisTier(RedisOptions(url=url), form), client)
        client.flushall()


@pytest.fixture(scope="module")
def cluster_port() -> Iterator[int]:
    try:
        with servers.redis_cluster() as nodes:
            yield nodes[1][0]
    except servers.Absent as error:
        pytest.skip(str(error))


@pytest.fixture
def cluster_store(cluster_port: int) -> Iterator[Redis]:
    import redis

    url = f"redis://127.0.0.1:{cluster_port}"
    client = redis.RedisCluster.from_url(url)
    client.flushall(target_nodes=redis.RedisCluster.PRIMARIES)
    yield Redis(url, lambda form: RedisTier(RedisOptions(url=url), form), client)
    client.close()


@pytest.fixture
def s3_store(s3_endpoint: str) -> Iterator[S3]:
    import obstore
    from obstore.store import S3Store

    login = {"access_key_id": servers.S3_KEY, "secret_access_key": servers.S3_SECRET}
    client = S3Store(servers.S3_BUCKET, endpoint=s3_endpoint, region="us-east-1", client_options={"allow_http": True}, **login)
    query = "&".join(f"{name}={value}" for name, value in {"endpoint": s3_endpoint, **login}.items())
    options = S3Options(bucket=servers.S3_BUCKET, endpoint=s3_endpoint, **login)

    def empty() -> None:
        for page in obstore.list(client):
            obstore.delete(client, [entry["path"] for entry in page])

    empty()
    yield S3(f"s3://{servers.S3_BUCKET}?{query}", lambda form: S3Tier(options, form), client)
    empty()


@pytest.fixture(params=["redis_store", "cluster_store", "s3_store"])
def store(request: pytest.FixtureRequest) -> Store:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture
def rack(store: Store) -> Rack:
    rack = Rack(SIZES)
    tier = store.open(FORMAT)
    try:
        assert (rack.put(tier) == Outcome.OK).all()
    finally:
        tier.close()
    return rack


def test_records_are_listed_by_their_namespaces(store: Any, rack: Rack) -> None:
    other, tier = Rack([1000], seed=2), store.open(OTHER)
    assert (other.put(tier) == Outcome.OK).all()
    tier.close()
    store.put_other()
    (found,) = tools.act("ls", store.url)
    assert found["records"] == len(SIZES) + 1 and found["payload_bytes"] == sum(SIZES) + 1000 and found["others"] == 0
    assert found["namespaces"] == (f"{NAMESPACE.hex()}: {len(SIZES)} records", f"{OTHER.namespace.hex()}: 1 records")
    (seen,) = tools.act("verify", store.url)
    assert (seen["right"], seen["corrupt"], seen["incomplete"], seen["keys"]) == (len(SIZES) + 1, 0, 0, ())


@pytest.mark.parametrize("at", [0, 30, HEADER_BYTES - 1, HEADER_BYTES + 5])
def test_damage_is_named_by_its_key(store: Any, rack: Rack, at: int) -> None:
    key = rack.keys[2].tobytes()
    store.flip(key, at)
    (seen,) = tools.act("verify", store.url)
    assert (seen["right"], seen["corrupt"], seen["keys"]) == (len(SIZES) - 1, 1, (key.hex(),))
    (found,) = tools.act("ls", store.url)
    assert found["others"] == (at < HEADER_BYTES) and found["records"] == len(SIZES) - found["others"]


def test_what_the_server_dropped_in_part_is_no_damage(redis_store: Redis) -> None:
    rack, tier = Rack(SIZES), redis_store.open(FORMAT)
    assert (rack.put(tier) == Outcome.OK).all()
    tier.close()
    redis_store.shorten(rack.keys[3].tobytes())
    (seen,) = tools.act("verify", redis_store.url)
    assert (seen["right"], seen["corrupt"], seen["incomplete"]) == (len(SIZES) - 1, 0, 1)


def test_purge_removes_records_and_nothing_else(store: Any, rack: Rack) -> None:
    store.put_other()
    (found,) = tools.act("purge", store.url)
    assert found == {"removed_bytes": sum(SIZES) + len(SIZES) * HEADER_BYTES}
    (left,) = store.others()
    assert b"somebody's" in left
    tier = store.open(FORMAT)
    assert not np.any(rack.has(tier))
    tier.close()


def test_something_else_by_a_records_name_is_told_and_removed(redis_store: Redis) -> None:
    name = names(NAMESPACE, [bytes(32)])[0]
    redis_store.client.rpush(head_name(name), b"a list")
    redis_store.client.set(head_name(names(NAMESPACE, [bytes(range(32))])[0]), b"short")
    assert tools.act("ls", redis_store.url)[0]["others"] == 2
    assert tools.act("verify", redis_store.url)[0]["corrupt"] == 2
    assert tools.act("purge", redis_store.url) == [{"removed_bytes": 5}] and not redis_store.others()


def test_what_went_since_it_was_listed_is_no_damage(redis_store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server evicts while somebody looks."""
    import redis

    rack, tier = Rack(SIZES), redis_store.open(FORMAT)
    assert (rack.put(tier) == Outcome.OK).all()
    tier.close()
    scan = redis.Redis.scan_iter
    gone = head_name(names(NAMESPACE, [bytes(32)])[0])
    monkeypatch.setattr(redis.Redis, "scan_iter", lambda *given, **named: [*scan(*given, **named), gone])
    (seen,) = tools.act("verify", redis_store.url)
    assert (seen["right"], seen["corrupt"], seen["incomplete"], seen["keys"]) == (len(SIZES), 0, 1, ())
    assert tools.act("ls", redis_store.url)[0]["others"] == 0


@pytest.mark.parametrize("action", tools.ACTIONS)
def test_a_login_that_may_do_too_little_is_an_error(redis_store: Redis, action: str) -> None:
    """And neither damage nor an empty store."""
    rack, tier = Rack(SIZES), redis_store.open(FORMAT)
    assert (rack.put(tier) == Outcome.OK).all()
    tier.close()
    redis_store.client.execute_command("ACL", "SETUSER", "guest", "on", ">secret", "~*", "+scan", "+info", "+command")
    try:
        with pytest.raises(ConfigError, match="cannot be asked: NoPerm") as caught:
            tools.act(action, redis_store.url.replace("//", "//guest:secret@"))
    finally:
        redis_store.client.execute_command("ACL", "DELUSER", "guest")
    assert "secret" not in str(caught.value) and len(redis_store.others()) == 2 * len(SIZES)


def test_options_of_a_url_are_read_as_the_tier_reads_them(redis_store: Redis) -> None:
    rack, tier = Rack(SIZES), redis_store.open(FORMAT)
    assert (rack.put(tier) == Outcome.OK).all()
    tier.close()
    assert tools.act("ls", f"{redis_store.url}?decode_responses=true&socket_keepalive=yes")[0]["records"] == len(SIZES)
    for wrong in ("nonsense=1", "socket_timeout=soon"):
        with pytest.raises(ConfigError, match="url of a Redis tier cannot be used"):
            tools.act("ls", f"{redis_store.url}?{wrong}")


def test_a_large_record_is_read_in_pieces(store: Any) -> None:
    form = RecordFormat(NAMESPACE, 64 << 20)
    rack, tier = Rack([40 << 20]), store.open(form)
    assert (rack.put(tier) == Outcome.OK).all()
    tier.close()
    tracemalloc.start()
    try:
        (seen,) = tools.act("verify", store.url)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen["right"] == 1 and peak < 24 << 20
    store.flip(rack.keys[0].tobytes(), HEADER_BYTES + (30 << 20))
    assert tools.act("verify", store.url)[0]["corrupt"] == 1


def test_much_that_is_wrong_takes_little_memory() -> None:
    count = 100_000
    found = (Name(bytes(8), at.to_bytes(32, "little")) for at in range(count))
    tracemalloc.start()
    try:
        seen = verify_records((name, Outcome.CORRUPT) for name in found)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen.corrupt == count and len(seen.keys) == 1000 and peak < 1 << 20


def test_namespaces_beyond_a_thousand_are_counted_together() -> None:
    digests = np.zeros((1, 16), np.uint8)

    def each() -> Iterator[tuple[Name, bytes]]:
        for at in range(1500):
            space, key = at.to_bytes(32, "big"), np.full((1, 32), 7, np.uint8)
            header = RecordFormat(space, 100).headers(key, np.array([100]), digests)
            yield Name(space[:8], key.tobytes()), header.tobytes()

    found = list_records(each())
    assert found.records == 1500 and found.payload_bytes == 150_000
    assert len(found.namespaces) == 1001 and found.namespaces[-1] == "others: 500 records"


@pytest.mark.parametrize(
    "url", ["redis://me:secret@127.0.0.1:{port}/0", "s3://bucket?endpoint=http://127.0.0.1:{port}&access_key_id=a&secret_access_key=secret"]
)  # fmt: skip
@pytest.mark.parametrize("action", tools.ACTIONS)
def test_a_server_that_is_not_there_is_one_error_without_secrets(url: str, action: str) -> None:
    with pytest.raises(ConfigError, match="cannot be asked") as caught:
        tools.act(action, url.format(port=servers.free_port()))
    assert "secret" not in str(caught.value)
