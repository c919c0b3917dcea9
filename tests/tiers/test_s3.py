"""The S3 tier against real servers, and behind a proxy that misbehaves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import obstore
import pytest
from obstore.store import S3Store

from kvortex.errors import ConfigError
from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.record import HEADER, HEADER_BYTES, RecordFormat
from kvortex.tiers.s3 import S3Options, S3Tier
from tests.tiers import servers
from tests.tiers.misbehaving import KINDS, Fault, misbehaving
from tests.tiers.racks import FORMAT, NAMESPACE, Rack

SIZES = [1 << 20, 4096, 65_536 + 17, 300, 1]
TOLERANCE = 2.0  # seconds that a call may come back after its deadline, on a busy machine
pytestmark = pytest.mark.usefixtures("nothing_leaks")
ENVIRONMENT = [name for name in os.environ if name.startswith("AWS_")]


@pytest.fixture(autouse=True)
def no_credentials_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of whoever runs the tests."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.fixture
def tier(s3_endpoint: str) -> Iterator[S3Tier]:
    tier = make(s3_endpoint)
    yield tier
    tier.close()


def make(endpoint: str, form: RecordFormat = FORMAT, **options: object) -> S3Tier:
    given = {"access_key_id": servers.S3_KEY, "secret_access_key": servers.S3_SECRET} | options
    return S3Tier(S3Options(bucket=servers.S3_BUCKET, endpoint=endpoint, **given), form)  # type: ignore[arg-type]


def store_of(endpoint: str) -> S3Store:
    return S3Store(
        servers.S3_BUCKET, endpoint=endpoint, access_key_id=servers.S3_KEY, secret_access_key=servers.S3_SECRET,
        region="us-east-1", client_options={"allow_http": True},
    )  # fmt: skip


def path_of(rack: Rack, at: int) -> str:
    name = rack.keys[at].tobytes().hex()
    return f"kvortex/{NAMESPACE.hex()}/{name[:2]}/{name}"


def check_round_trip(endpoint: str) -> None:
    rack = Rack(SIZES * 4, seed=int(time.time() * 1e6) % 2**32)
    first = make(endpoint)
    assert not rack.has(first).any() and (rack.get(first).outcomes == Outcome.MISS).all()
    assert (rack.put(first) == Outcome.OK).all() and rack.has(first).all()
    first.close()
    again = make(endpoint, connections=1)
    fetched = rack.get(again)
    assert (fetched.outcomes == Outcome.OK).all() and (fetched.sizes == rack.sizes).all()
    assert (again.delete(rack.keys[:3], rack.call()) == Outcome.OK).all()
    assert (again.delete(rack.keys[:3], rack.call()) == Outcome.MISS).all()
    assert rack.has(again).tolist() == [False] * 3 + [True] * (len(rack.keys) - 3)
    assert (rack.put(again) == Outcome.OK).all() and again.probe(rack.call()) is None
    again.close()
    again.close()
    assert (rack.put(again) == Outcome.FAILED).all() and (rack.get(again).outcomes == Outcome.FAILED).all()
    assert rack.wrong_bytes == 0


def test_what_was_put_comes_back_to_another_tier(s3_endpoint: str) -> None:
    check_round_trip(s3_endpoint)


def test_a_store_that_checks_signatures() -> None:
    try:
        with servers.seaweedfs_server() as (endpoint, _):
            check_round_trip(endpoint)
            bad = make(endpoint, secret_access_key="hunter2")
            rack = Rack([4096])
            assert rack.put(bad)[0] == Outcome.FAILED == rack.get(bad).outcomes[0]
            assert "403" in bad.trouble and "hunter2" not in f"{bad.trouble} {bad.options!r}"
            bad.close()
    except servers.Absent as error:
        pytest.skip(str(error))


def test_an_object_is_a_header_and_the_payload(s3_endpoint: str, tier: S3Tier) -> None:
    rack = Rack([5000])
    rack.put(tier)
    whole = bytes(obstore.get(store_of(s3_endpoint), path_of(rack, 0)).bytes())
    assert whole[HEADER_BYTES:] == rack.payload(0).tobytes()
    assert FORMAT.check_headers(np.frombuffer(whole, HEADER, 1), rack.keys)[0] == Outcome.OK


def test_two_namespaces_never_meet(s3_endpoint: str, tier: S3Tier) -> None:
    other = make(s3_endpoint, RecordFormat(bytes(32), FORMAT.most_bytes))
    rack = Rack([4096] * 3, seed=5)
    rack.put(tier)
    assert not rack.has(other).any() and (rack.get(other).outcomes == Outcome.MISS).all()
    store = store_of(s3_endpoint)
    for at in range(3):  # copied by hand to where the other looks
        obstore.copy(store, path_of(rack, at), path_of(rack, at).replace(NAMESPACE.hex(), bytes(32).hex()))
    assert rack.has(other).all() and (rack.get(other).outcomes == Outcome.MISS).all()
    assert (rack.get(tier).outcomes == Outcome.OK).all() and rack.wrong_bytes == 0
    other.close()


def test_every_byte_of_an_object_counts(s3_endpoint: str, tier: S3Tier) -> None:
    rack = Rack([500], seed=6)
    store = store_of(s3_endpoint)
    rack.put(tier)
    whole = bytes(obstore.get(store, path_of(rack, 0)).bytes())
    rng = np.random.default_rng(4)
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        obstore.put(store, path_of(rack, 0), bytes(damaged))
        outcome = rack.get(tier).outcomes[0]
        assert outcome == (Outcome.MISS if place < 12 else Outcome.CORRUPT), place
        assert rack.has(tier)[0] == (place < 12)
    assert rack.put(tier)[0] == Outcome.OK == rack.get(tier).outcomes[0] and rack.wrong_bytes == 0


CHANGES = ["empty", "shorter", "longer", "much longer", "header", "part of it", "foreign", "other key"]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_whole_record_is_not_handed_out(s3_endpoint: str, tier: S3Tier, change: str) -> None:
    rack = Rack([4096] * 3, seed=7)
    rack.put(tier)
    store = store_of(s3_endpoint)
    whole, other = (bytes(obstore.get(store, path_of(rack, at)).bytes()) for at in (1, 2))
    changed = {
        "empty": b"", "shorter": whole[:-1], "longer": whole + b"x", "much longer": whole + bytes(200_000),
        "header": whole[:HEADER_BYTES], "part of it": whole[:100], "foreign": b"hello" * 1000, "other key": other,
    }[change]  # fmt: skip
    obstore.put(store, path_of(rack, 1), changed)
    wanted = Outcome.MISS if change in ("empty", "foreign", "other key") else Outcome.CORRUPT
    assert rack.get(tier).outcomes.tolist() == [Outcome.OK, wanted, Outcome.OK]
    assert (rack.put(tier) == Outcome.OK).all() and (rack.get(tier).outcomes == Outcome.OK).all() and rack.wrong_bytes == 0


def test_a_larger_record_than_the_slot_is_a_miss(tier: S3Tier) -> None:
    rack = Rack([8192, 300_000], seed=8)
    rack.put(tier)
    fetched = tier.get_into(rack.keys, rack.targets, np.array([8192, 299_999]), rack.call())
    assert fetched.outcomes.tolist() == [Outcome.OK, Outcome.MISS] and fetched.sizes.tolist() == [8192, 0]


def test_a_bucket_that_is_not_there_fails(s3_endpoint: str) -> None:
    tier = S3Tier(S3Options(bucket="nobodys", endpoint=s3_endpoint, access_key_id="k", secret_access_key="s"), FORMAT)
    rack = Rack([4096])
    assert rack.put(tier)[0] == Outcome.FAILED == rack.get(tier).outcomes[0] and "NoSuchBucket" in tier.trouble
    assert tier.probe(rack.call()) is not None and not rack.has(tier)[0]
    tier.close()


def test_tiers_share_a_store(s3_endpoint: str) -> None:
    tiers = [make(s3_endpoint, connections=2) for _ in range(3)]
    racks = [Rack([4096, 70_000, 300], seed=9) for _ in range(6)]
    failures: list[object] = []

    def work(at: int) -> None:
        rng = np.random.default_rng(at)
        rack, tier = racks[at], tiers[at % 3]
        for _ in range(12):
            outcomes = (rack.put, rack.get, lambda t: t.delete(rack.keys, rack.call()))[rng.integers(3)](tier)
            outcomes = getattr(outcomes, "outcomes", outcomes)
            if not set(outcomes.tolist()) <= {Outcome.OK, Outcome.MISS}:
                failures.append((outcomes, tier.trouble))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tier in tiers:
        tier.close()
    assert not failures and sum(rack.wrong_bytes for rack in racks) == 0


def test_a_paused_server_is_waited_for_until_the_deadline_and_a_killed_one_fails() -> None:
    rack = Rack([70_000] * 4)
    try:
        with servers.moto_server() as (endpoint, server):
            tier = make(endpoint)
            assert (rack.put(tier) == Outcome.OK).all()
            server.pause()
            assert (rack.get(tier, seconds=0.4).outcomes == Outcome.TIMEOUT).all()
            assert (rack.put(tier, seconds=0.4) == Outcome.TIMEOUT).all()
            assert rack.has(tier, seconds=0.4) is None and rack.latest < TOLERANCE
            end = time.monotonic() + 0.3
            call = Call(time.monotonic() + 30, lambda: time.monotonic() > end)
            assert (tier.get_into(rack.keys, rack.targets, rack.sizes, call).outcomes == Outcome.CANCELLED).all()
            assert time.monotonic() < end + 2
            server.resume()
            assert (rack.put(tier) == Outcome.OK).all() and (rack.get(tier).outcomes == Outcome.OK).all()
            server.stop()
            started = time.monotonic()
            assert (rack.put(tier) == Outcome.FAILED).all() and (rack.get(tier).outcomes == Outcome.FAILED).all()
            assert time.monotonic() - started < 3
            server.start()
            assert (rack.get(tier).outcomes == Outcome.FAILED).all()  # moto keeps buckets in memory
            tier.close()
    except servers.Absent as error:
        pytest.skip(str(error))
    assert rack.wrong_bytes == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_server", [False, True])
def test_a_fault_anywhere_in_the_stream_costs_keys_and_never_bytes(s3_endpoint: str, kind: str, to_server: bool) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    rack = Rack([3000, 100, 30_000], seed=10)
    behind = make(s3_endpoint)
    is_slow = kind in ("stall", "drip")
    with misbehaving(int(s3_endpoint.rpartition(":")[2])) as proxy:
        tier = make(f"http://127.0.0.1:{proxy.port}", connections=2, retries=0)
        for _ in range(2 if is_slow else 8):
            rack.put(behind)
            rack.get(tier)
            is_put = bool(rng.integers(2))
            span = 35_000 if is_put == to_server else 1500
            fault = Fault(kind, int(rng.integers(span)), to_server, int(rng.integers(1, 9)), seconds=0.05)
            proxy.arm(fault)
            seconds = 0.4 if is_slow or kind in ("drop", "insert", "flip") else 5.0
            outcomes = rack.put(tier, seconds=seconds) if is_put else rack.get(tier, seconds=seconds).outcomes
            assert set(outcomes.tolist()) <= set(Outcome) - {Outcome.CANCELLED}
            proxy.disarm()
            assert set(rack.get(tier).outcomes.tolist()) <= {Outcome.OK, Outcome.MISS, Outcome.CORRUPT}
            assert (rack.put(tier) == Outcome.OK).all() and rack.has(tier).all()
            assert (rack.get(tier).outcomes == Outcome.OK).all()
        tier.close()
    behind.close()
    assert rack.wrong_bytes == 0 and rack.latest < TOLERANCE


def test_requests_are_repeated_as_often_as_said(s3_endpoint: str) -> None:
    rack = Rack([4096], seed=11)
    with misbehaving(int(s3_endpoint.rpartition(":")[2])) as proxy:
        patient, hasty = (make(f"http://127.0.0.1:{proxy.port}", retries=retries) for retries in (2, 0))
        for tier, wanted in ((patient, Outcome.OK), (hasty, Outcome.FAILED)):
            proxy.arm(Fault("cut", 0))
            assert rack.put(tier)[0] == wanted
            proxy.disarm()
            proxy.arm(Fault("cut", 10))
            fresh = make(f"http://127.0.0.1:{proxy.port}", retries=tier.options.retries)
            assert rack.get(fresh).outcomes[0] == wanted
            fresh.close()
            tier.close()


def test_credentials_are_found_where_aws_has_them(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def key(**options: object) -> str:
        tier = S3Tier(S3Options(bucket="some-bucket", **options), FORMAT)  # type: ignore[arg-type]
        url = tier._bucket.urls("GET", ["a"])[0]
        tier.close()
        return f"{url.netloc} {url.query.partition('Credential=')[2].partition('%2F')[0]} {url.query.split('%2F')[2]}"

    (tmp_path / "config").write_text("[default]\nregion = eu-north-1\n[profile other]\nendpoint_url = https://s3.other:9000\n")
    keys = "[{}]\naws_access_key_id = {}\naws_secret_access_key = x\n"
    (tmp_path / "credentials").write_text(keys.format("default", "A") + keys.format("other", "B"))
    assert key() == "s3.eu-north-1.amazonaws.com A eu-north-1"
    assert key(profile="other") == "s3.other:9000 B us-east-1"
    assert key(access_key_id="C", secret_access_key="c", endpoint="http://h:1", region="x-1") == "h:1 C x-1"
    assert key(endpoint="http://h:1", virtual_hosted=True) == "some-bucket.h:1 A eu-north-1"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "D")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "d")
    monkeypatch.setenv("AWS_REGION", "sa-east-1")
    assert key() == "s3.sa-east-1.amazonaws.com D sa-east-1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://env:7")
    assert key() == "env:7 D sa-east-1" and key(profile="other") == "env:7 B sa-east-1"
    with pytest.raises(ConfigError, match="no profile"):
        key(profile="nobody")
    (tmp_path / "credentials").write_text("nonsense")
    with pytest.raises(ConfigError, match="credentials"):
        key()


def test_the_query_of_a_signed_url_is_valid_for_minutes(s3_endpoint: str, tier: S3Tier) -> None:
    assert f"X-Amz-Expires={int(timedelta(minutes=15).total_seconds())}" in tier._bucket.urls("GET", ["a"])[0].query


@pytest.mark.parametrize(
    "options",
    [{"bucket": "x"}, {"bucket": 3}, {"prefix": "/a"}, {"prefix": "a//b"}, {"prefix": "a/../b"}, {"prefix": "ä"},
     {"endpoint": "h:9"}, {"endpoint": "http://u:p@h"}, {"endpoint": "http://h/path"}, {"endpoint": "http://h:x"},
     {"endpoint": 3}, {"access_key_id": "k"}, {"session_token": "t"}, {"region": ""}, {"connections": 0}, {"retries": -1},
     {"connect_timeout_s": "1"}, {"virtual_hosted": 1}],
)  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        S3Options(**({"bucket": "good-bucket"} | options))  # type: ignore[arg-type]


def test_secrets_are_not_shown() -> None:
    options = S3Options(bucket="good-bucket", access_key_id="hunter1", secret_access_key="hunter2", session_token="hunter3")
    assert "hunter" not in repr(options)
    with pytest.raises(ConfigError) as error:
        S3Options(bucket="good-bucket", access_key_id="hunter1", secret_access_key="hunter2\n")
    assert "hunter" not in str(error.value)


def test_certificates_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("nonsense")
    with pytest.raises(ConfigError, match="ca_file"):
        S3Tier(S3Options(bucket="good-bucket", access_key_id="k", secret_access_key="s", ca_file=str(tmp_path / "ca")), FORMAT)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(ConfigError, match="extra s3"):
        S3Tier(S3Options(bucket="good-bucket"), FORMAT)
