"""Tiers by name: what is taken, what is refused, and that no password is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvortex import ConfigError, KVortexConfig
from kvortex.errors import hidden
from kvortex.tiers import BreakerOptions, RecordFormat, TierOptions, tools
from kvortex.tiers.memory import MemoryStore, MemoryTier, shared_store
from kvortex.tiers.urls import open_tier, open_tiers, parse_url

FORM = RecordFormat(bytes(32), 4096)


def test_options_of_the_cascade_are_told_from_the_tiers_own() -> None:
    url = "s3://bucket/prefix?mode=back&read_timeout_s=0.5&breaker_failures=7&region=eu&least_bytes=64KiB&local=no"
    bare, options, left = parse_url(url, {"batch_blocks": 9, "endpoint": "http://127.0.0.1:1"})
    assert bare == "s3://bucket/prefix" and left == {"region": "eu", "endpoint": "http://127.0.0.1:1"}
    wanted: dict[str, Any] = {"mode": "back", "read_timeout_s": 0.5, "least_bytes": 64 << 10, "local": False, "batch_blocks": 9}
    assert options == TierOptions(**wanted, breaker=BreakerOptions(failures=7))


@pytest.mark.parametrize("url", ["disk:/a,/b", "redis://u:p@host:6379/0", "memory:name"])
def test_a_url_without_options_is_as_it_was(url: str) -> None:
    assert parse_url(url) == (url, TierOptions(), {})


BAD = [
    ("ftp://x", "unknown scheme; known are disk"),
    ("nothing", "unknown scheme"),
    ("disk:/x?mode=sideways", "mode = 'sideways': must be one of"),
    ("disk:/x?read_threads=0", "read_threads = 0: must be an integer"),
    ("disk:/x?read_threads=many", "read_threads = 'many' is no int"),
    ("disk:/x?queue_bytes=1Gib&queue_bytes=2", "'queue_bytes' stands twice"),
    ("disk:/x?least_bytes=12parsecs", "least_bytes = '12parsecs' is no int"),
    ("disk:/x?local=perhaps", "local = 'perhaps' is no bool"),
    ("disk:/x?breaker_pause_s=0", "pause_s = 0.0: must be a number of seconds"),
    ("memory:x?colour=red", "unknown option 'colour'; known are capacity_bytes"),
    ("memory:x?capacity=big", "capacity_bytes = 'big' is no int: 'big' is no size"),
    ("memory:x?capacity=1MiB&capacity_bytes=2MiB", "'capacity_bytes' stands twice"),
    ("memory:x?name=y", "'name' stands twice: the URL says it before its '?'"),
    ({"url": "disk:/kvortex-a", "paths": ["/kvortex-b"]}, "'paths' stands twice: the URL says it before its '?'"),
    ("redis://127.0.0.1:1/0?url=redis://127.0.0.1:2/0", "'url' stands twice: the URL says it before its '?'"),
    ("redis://127.0.0.1:1/blocks", "the path is the number of a database, not 'blocks'"),
    ("redis://127.0.0.1:1/1/2", "the path is the number of a database, not '1/2'"),
    (17, "17 is no URL"),
    ({"mode": "back"}, "is no URL, no table with a url"),
    ((MemoryTier, 3), "makes no tier"),
]


@pytest.mark.parametrize(("entry", "why"), BAD, ids=[str(entry) for entry, _ in BAD])
def test_what_is_wrong_is_told(entry: Any, why: str) -> None:
    with pytest.raises(ConfigError, match="^tier") as caught:
        open_tier(entry, FORM)
    assert why in str(caught.value)


def test_a_password_is_in_no_message() -> None:
    assert hidden("redis://me:secret@host:1/0") == "redis://me:***@host:1/0"
    for url in ("redis://me:secret@host/0?mode=x", "redis://:secret@host/0?mode=x", "ftp://me:secret@host"):
        with pytest.raises(ConfigError) as caught:
            open_tier(url, FORM)
        assert "secret" not in str(caught.value) and "host" in str(caught.value)


SECRETS: list[tuple[str, Callable[[], Any]]] = [
    ("tiers = ", lambda: KVortexConfig(tiers="redis://:hunter2@host")),  # type: ignore[arg-type]
    ("tiers[0] = ", lambda: KVortexConfig(tiers=("REDIS://:hunter2@host",))),
    ("16 at most", lambda: KVortexConfig(tiers=("redis://:hunter2@host",) * 17)),
    ("must be a sequence", lambda: open_tiers("redis://:hunter2@host", FORM)),
    ("no table with a url", lambda: open_tier({"URL": "redis://:hunter2@host"}, FORM)),
    ("no table with a url", lambda: open_tier({"uri": "s3://bucket", "secret_access_key": "hunter2"}, FORM)),
    ("%2F", lambda: open_tier("redis://:hunter2/x@host", FORM)),
    ("%2F", lambda: open_tier("redis://:x/hunter2@host", FORM)),
    ("no host and port", lambda: open_tier("redis://:hunter2/0", FORM)),
    ("no host and port", lambda: open_tier("redis://me:hunter2?x@host", FORM)),
    ("nonsense", lambda: open_tier("redis://:x@hunter2@host?nonsense=1", FORM)),
    ("has no login", lambda: open_tier("s3://AKIA:hunter2@bucket", FORM)),
    ("has no login", lambda: open_tier("s3://AKIA:hun/hunter2@bucket/prefix", FORM)),
    ("has no login", lambda: tools.act("ls", "s3://AKIA:hunter2@bucket")),
    ("bucket must be", lambda: open_tier("s3://AKIA:hunter2", FORM)),
    ("bucket must be", lambda: tools.act("ls", "s3://AKIA:hunter2/prefix")),
    ("unknown scheme", lambda: open_tier("gopher://x?secret_access_key=hunter2", FORM)),
    ("unknown scheme", lambda: open_tier("gopher://me:" + "hunter2" * 30 + "@" + "host" * 30, FORM)),
]


@pytest.mark.parametrize(("why", "wrong"), SECRETS)
def test_no_refusal_shows_what_may_be_secret(why: str, wrong: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        wrong()
    assert why in str(caught.value) and "hunter" not in str(caught.value)


@pytest.mark.parametrize("action", tools.ACTIONS)
def test_a_url_that_cannot_be_read_is_one_error_of_tools_too(action: str) -> None:
    for url in ("s3://[bucket", "s3://b\x1b[31mucket", "s3:bucket", "redis://[x"):
        with pytest.raises(ConfigError):
            tools.act(action, url)


@pytest.mark.parametrize("url", ["redis://h:6379/0", "redis://h:6379", "s3://b/p", "redis://[::1]:3/0", "x://h:1: no"])
def test_what_is_no_secret_is_shown(url: str) -> None:
    assert hidden(url) == url


def test_a_config_can_be_printed() -> None:
    tiers = ("redis://:hunter2@host", {"url": "s3://bucket", "secret_access_key": "hunter2"})
    assert "hunter2" not in repr(KVortexConfig(tiers=tiers))


@pytest.mark.parametrize(
    "url",
    ["redis://me:sec/ret@host:1/0", "redis://me:sec?ret@host:1/0", "redis://me:sec#ret@host:1/0", "redis://me:sec@ret@host:x/0",
     "redis://:secret/0", "redis://:12345secret", "redis://me:secret@host:1,redis://:secret@host:2"],
)  # fmt: skip
def test_a_password_that_is_not_quoted_is_in_no_message(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_tier(url, FORM)
    assert "sec" not in str(caught.value) and "ret" not in str(caught.value)


def test_what_was_opened_before_a_refusal_is_closed() -> None:
    closed = []

    class Closing(MemoryTier):
        def close(self) -> None:
            closed.append(self)

    with pytest.raises(ConfigError, match="unknown scheme"):
        open_tiers((lambda form: Closing(MemoryStore(), form), "gopher://x"), FORM)
    assert len(closed) == 1


def test_memory_by_name_is_shared_and_local() -> None:
    first, second = open_tiers(("memory:shared-here?capacity=1MiB", {"url": "memory:shared-here", "write_threads": 3}), FORM)
    assert isinstance(first.tier, MemoryTier) and isinstance(second.tier, MemoryTier)
    assert first.tier.store is second.tier.store is shared_store("shared-here") and first.tier.capacity_bytes == 1 << 20
    assert first.options.local and second.options == TierOptions(write_threads=3, local=True)


def test_the_environment_and_toml_name_tiers(tmp_path: Path) -> None:
    text = "disk:/a,/b?capacity=1GiB, redis://h:1/0,s3://b/p"
    environ = {"KVORTEX_TIERS": text, "KVORTEX_TIER_POOL_SHARE": "0.125"}
    config = KVortexConfig.from_env(environ)
    assert config.tiers == ("disk:/a,/b?capacity=1GiB", "redis://h:1/0", "s3://b/p") and config.tier_pool_share == 0.125
    assert KVortexConfig.from_env({"KVORTEX_TIERS": ""}).tiers == ()
    path = tmp_path / "kvortex.toml"
    path.write_text('[kvortex]\ntiers = ["memory:a", {url = "redis://h:1/0", mode = "back", write_delay_s = 5}]\n')
    config = KVortexConfig.from_toml(path)
    assert config.tiers == ("memory:a", {"url": "redis://h:1/0", "mode": "back", "write_delay_s": 5})
    assert parse_url(config.tiers[1]["url"], {"mode": "back", "write_delay_s": 5})[1].write_delay_s == 5
    path.write_text(f'tiers = "{text}"\n')
    assert len(KVortexConfig.from_toml(path).tiers) == 3
    with pytest.raises(ConfigError, match="tier_pool_share = 'much' is no number"):
        KVortexConfig.from_env({"KVORTEX_TIER_POOL_SHARE": "much"})


IMPOSSIBLE = [("admit_after", 256), ("write_threads", 0), ("fresh_s", 0.0), ("local", 1), ("breaker", 3)]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = "):
        TierOptions(**{name: value})


def test_a_codec_that_nobody_has_made_is_refused() -> None:
    """As by vLLM's tier, whose chunks are whatever they are."""
    for entry in ("memory:coded?codec=plane", {"url": "memory:coded", "codec": "cachegen", "codec_level": 2}):
        with pytest.raises(ConfigError, match="the blocks of tier .* are not coded; leave it out"):
            open_tier(entry, FORM)
    with pytest.raises(ConfigError, match="blocks of this tier are not coded"):
        open_tier((lambda form: MemoryTier(MemoryStore(), form), TierOptions(codec="int8")), FORM)
    assert open_tier("memory:coded?codec=raw", FORM).coding is None
    assert open_tier("memory:coded", FORM).tier.form is FORM  # type: ignore[attr-defined]
