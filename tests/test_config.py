"""Options: what is taken, what is refused, and that a refusal names the option."""

from __future__ import annotations

import dataclasses
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex import ConfigError, KVortexConfig, KVortexError
from kvortex.config import parse_size
from kvortex.errors import shown

GOOD: dict[str, list[Any]] = {
    "cpu_pool_size_bytes": [1, 4096, 1 << 44],
    "gpu_pool_size_bytes": [None, 1, 96 << 20],
    "num_transfer_streams": [None, 1, 3, 32],
    "staging_buffers": [None, 1, 8, 32],
    "calibrate": ["never", "stored", "once"],
    "transfer_route": ["auto", "staged", "strided", "batched", "mapped"],
    "eviction_policy": ["lru", "s3fifo", "arc", "lfu"],
    "admit_after": [1, 2, 255],
    "beside_compute": [None, True, False],
    "digests": [True, False],
    "codec": ["raw", "plane", "int8", "k6v4", "k4v4", "k4v3"],
    "codec_tables": ["", None, "model.tables"],
    "enable_numa": [True, False],
    "device": ["auto", "host", "cuda", "cuda:0", "cuda:15"],
    "block_size": [1, 16, 256],
    "max_block_bytes": [None, 1, 2 << 20],
    "model": ["", "llama-3-8b", "模型"],
    "dtype": ["", "bfloat16"],
    "rank": [0],
    "world_size": [1, 8],
    "lora": ["", "adapter"],
    "salt": ["", "tenant-7"],
    "record_trace": ["", None, "trace.jsonl"],
    "key_scheme": ["kvortex", "vllm", "vllm-0.15"],
    "key_seed": ["0", "", "random", None],
    "transfer_timeout_s": [0.001, 1, 3600.0],
    "tiers": [(), ("disk:/var/cache/kv?capacity=100GiB", {"url": "redis://host:6379/0", "mode": "back"}, print)],
    "tier_pool_share": [0.01, 0.5],
    "link_share_beside_compute": [0.01, 0.5, 1, 1.0, (0.01, 1)],
}
BAD: dict[str, list[Any]] = {
    "cpu_pool_size_bytes": [0, -1, 1.5, 1e9, "16 GiB", True, None],
    "gpu_pool_size_bytes": [0, -1, 2.0, False],
    "num_transfer_streams": [0, -1, 33, 3.0, True],
    "staging_buffers": [0, -1, 33, 4.0, True, "4"],
    "calibrate": ["", "always", True, None],
    "transfer_route": ["", "STAGED", "direct", None, 1],
    "eviction_policy": ["", "LRU", "fifo", None, 1],
    "admit_after": [0, -1, 256, True, 1.5, None],
    "beside_compute": [1, 0, "true"],
    "digests": [1, 0, "true", None],
    "codec": ["", "Plane", "cachegen", None, 1],
    "codec_tables": [b"model.tables", 3, True],
    "enable_numa": [1, 0, "true", None],
    "device": ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:0\n", "cuda:00", "cuda:٣", "CUDA", "host:0", 0, None],
    "block_size": [0, -16, 16.0, True, None],
    "max_block_bytes": [0, -1, 1.0, True, "1MiB"],
    "model": [None, 1, b"llama"],
    "dtype": [None, float],
    "rank": [-1, 1, 0.0, False, None],  # the default world has one rank
    "world_size": [0, -1, 1.0, True, None],
    "lora": [None, 3],
    "salt": [None, b""],
    "record_trace": [b"trace.jsonl", 3, True],
    "key_scheme": ["", "VLLM", "sha256_cbor", "vllm-0.33", None, 1],
    "key_seed": [0, b"0", True],
    "transfer_timeout_s": [0, 0.0, -1.0, float("inf"), float("nan"), True, "60", None],
    "tiers": [None, "disk:/var/cache/kv", 3, {"url": "disk:/"}],
    "tier_pool_share": [0, -0.1, 0.51, float("nan"), True, "0.1", None],
    "link_share_beside_compute": [
        *(0, -0.1, 5e-324, 0.0099, 1.01, float("nan"), True, "0.9", None),
        *((), (0.5,), (1, 1, 1), (0, 1), (0.5, None), "11"),
    ],
}
CASES = [(name, value) for name, values in BAD.items() for value in values]


def test_every_option_has_good_and_bad_values() -> None:
    names = {field.name for field in dataclasses.fields(KVortexConfig)}
    assert set(GOOD) == names
    assert set(BAD) == names


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_good_value_is_kept(name: str, value: Any) -> None:
    assert getattr(KVortexConfig(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}={value!r}" for name, value in CASES])
def test_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = ") as caught:
        KVortexConfig(**{name: value})
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)


INTEGERS = [field.name for field in dataclasses.fields(KVortexConfig) if "int" in str(field.type)]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [2**63, 10**400, 10**5000, -(10**5000)], ids=["2**63", "10**400", "10**5000", "-10**5000"])
def test_an_integer_beyond_63_bits_is_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = .*must be an integer from") as caught:
        KVortexConfig(**{name: value})
    assert len(str(caught.value)) < 200
    if name not in ("num_transfer_streams", "staging_buffers", "admit_after", "rank"):  # which other options keep below that
        assert getattr(KVortexConfig(**{name: 2**63 - 1}), name) == 2**63 - 1


TOO_LONG = [threading.TIMEOUT_MAX * 1.001, 1e300, 10**400, 10**5000, float("inf"), float("nan")]


@pytest.mark.parametrize("value", TOO_LONG, ids=["limit", "1e300", "10**400", "10**5000", "inf", "nan"])
def test_a_timeout_that_no_wait_can_take_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="^transfer_timeout_s = .*: must be a number of seconds above 0, [0-9]+") as caught:
        KVortexConfig(transfer_timeout_s=value)
    assert len(str(caught.value)) < 200


def test_the_longest_timeout_can_be_waited() -> None:
    config = KVortexConfig(transfer_timeout_s=threading.TIMEOUT_MAX)
    assert config.transfer_timeout_s == threading.TIMEOUT_MAX
    event = threading.Event()
    event.set()
    assert event.wait(config.transfer_timeout_s)


def test_rank_lies_in_its_world() -> None:
    assert KVortexConfig(rank=7, world_size=8).rank == 7
    with pytest.raises(ConfigError, match="rank = 8: must be below world_size = 8"):
        KVortexConfig(rank=8, world_size=8)


def test_config_is_frozen_and_by_keyword_only() -> None:
    config = KVortexConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 32  # type: ignore[misc]
    with pytest.raises(TypeError):
        KVortexConfig(1 << 30)  # type: ignore[misc]
    assert dataclasses.replace(config, block_size=32).block_size == 32
    with pytest.raises(ConfigError, match="block_size"):
        dataclasses.replace(config, block_size=0)


def test_config_error_is_a_value_error_and_a_kvortex_error() -> None:
    assert issubclass(ConfigError, KVortexError)
    assert issubclass(ConfigError, ValueError)


def test_mapping_parses_strings() -> None:
    config = KVortexConfig.from_mapping(
        {
            "cpu_pool_size_bytes": "1.5 GiB",
            "max_block_bytes": "2MiB",
            "num_transfer_streams": "4",
            "digests": " Off ",
            "enable_numa": " Off ",
            "beside_compute": "yes",
            "transfer_timeout_s": "2.5",
            "link_share_beside_compute": "0.5",
            "model": "16",  # names stay names
            "record_trace": "17",
            "block_size": 32,
        }
    )
    assert config.cpu_pool_size_bytes == 3 << 29
    assert config.max_block_bytes == 2 << 20
    assert config.num_transfer_streams == 4
    assert config.enable_numa is False and config.beside_compute is True
    assert config.transfer_timeout_s == 2.5 and config.link_share_beside_compute == 0.5
    assert config.model == "16" and config.record_trace == "17"
    assert config.block_size == 32


def test_shares_of_the_link_are_one_or_two() -> None:
    given = [0.5, 0.75]
    for pair in (given, (0.5, 0.75), "0.5,0.75", " 0.5, 0.75"):
        config = KVortexConfig.from_mapping({"link_share_beside_compute": pair})
        assert config.link_share_beside_compute == (0.5, 0.75) == config.link_shares and hash(config)
    assert KVortexConfig.from_env({"KVORTEX_LINK_SHARE_BESIDE_COMPUTE": "0.25"}).link_shares == (0.25, 0.25)
    for text in ("0.5,", "a", "0.5,0.5,0.5", "2,0.5", "\u0661"):
        with pytest.raises(ConfigError, match="link_share_beside_compute"):
            KVortexConfig.from_mapping({"link_share_beside_compute": text})


@pytest.mark.parametrize(("word", "value"), [(w, True) for w in ("1", "true", "YES", "On")])
def test_words_for_true(word: str, value: bool) -> None:
    assert KVortexConfig.from_mapping({"enable_numa": word}).enable_numa is value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("enable_numa", "perhaps"),
        ("beside_compute", "none"),
        ("num_transfer_streams", "three"),
        ("num_transfer_streams", "3.0"),
        ("transfer_timeout_s", "soon"),
        ("cpu_pool_size_bytes", "lots"),
        ("max_block_bytes", ""),
    ],
)
def test_unreadable_string_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=name):
        KVortexConfig.from_mapping({name: text})


def test_unknown_names_are_all_named_with_their_source() -> None:
    with pytest.raises(ConfigError, match="somewhere: unknown option 'cpu_pool', 'streams'; known are .*cpu_pool_size_bytes"):
        KVortexConfig.from_mapping({"streams": 3, "cpu_pool": 1, "block_size": 16}, source="somewhere")
    with pytest.raises(TypeError, match="streams"):
        KVortexConfig(streams=3)  # type: ignore[call-arg]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"KVORTEX_CPU_POOL_SIZE_BYTES": "16GiB", "KVORTEX_DEVICE": "host", "KVORTEX_CACHE_DIR": "/tmp", "HOME": "/"}
    config = KVortexConfig.from_env(environ)
    assert (config.cpu_pool_size_bytes, config.device) == (16 << 30, "host")
    assert KVortexConfig.from_env(environ, device="cuda:1").device == "cuda:1"
    assert KVortexConfig.from_env({}) == KVortexConfig()
    monkeypatch.setenv("KVORTEX_BLOCK_SIZE", "64")
    assert KVortexConfig.from_env().block_size == 64


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"KVORTEX_STREAMS": "3"}, r"KVORTEX_\*.*'streams'"),
        ({"KVORTEX_BLOCK_SIZE": "big"}, r"KVORTEX_\*.*block_size"),
        ({"KVORTEX_BLOCK_SIZE": "0"}, "block_size = 0"),
    ],
)
def test_bad_environment_is_refused_by_name(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVortexConfig.from_env(environ)


def test_bad_keyword_beside_environment_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="keyword: unknown option 'streams'"):
        KVortexConfig.from_env({}, streams=3)


@pytest.mark.parametrize("head", ["", "[kvortex]\n", "[other]\nx = 1\n[kvortex]\n"])
def test_toml(tmp_path: Path, head: str) -> None:
    path = tmp_path / "kvortex.toml"
    path.write_text(head + 'cpu_pool_size_bytes = "2 GiB"\nblock_size = 32\nenable_numa = false\ntransfer_timeout_s = 5\n')
    config = KVortexConfig.from_toml(path, block_size=64)
    assert (config.cpu_pool_size_bytes, config.block_size, config.enable_numa) == (2 << 30, 64, False)
    assert config.transfer_timeout_s == 5
    assert KVortexConfig.from_toml(str(path)).block_size == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocksize = 16", "unknown option 'blocksize'"),
        ("[other]\nblock_size = 16", "unknown option 'other'"),
        ("block_size = 0", "block_size = 0"),
        ("block_size = 16.0", "block_size = 16.0"),
        ("kvortex = 3", "'kvortex' must be a table"),
        ("block_size = ", "kvortex.toml: "),
    ],
)
def test_bad_toml_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "kvortex.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        KVortexConfig.from_toml(path)


def test_missing_toml_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        KVortexConfig.from_toml(tmp_path / "absent.toml")


def test_a_path_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kvortex.toml"
    path.write_text("block_size = 32")
    with path.open("rb") as file:
        with pytest.raises(ConfigError, match="must be a string or a Path; seen: [0-9]+$"):
            KVortexConfig.from_toml(file.fileno())  # type: ignore[arg-type]
        assert file.read() == b"block_size = 32", "the caller's file is neither read nor closed"
    with pytest.raises(ConfigError, match="seen: None"):
        KVortexConfig.from_toml(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"a\\0b\.toml: embedded null"):
        KVortexConfig.from_toml("a\0b.toml")
    assert KVortexConfig.from_toml(str(path).encode()).block_size == 32  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [
        b'model = "\xff"',
        b"model = " + b"[" * 5000 + b"]" * 5000,
        b"block_size = " + b"9" * 5000,
        b"block_size = " + b"9" * 4000,
        b'block_size = "' + b"9" * 5000 + b'"',
        b'cpu_pool_size_bytes = "' + b"9" * 5000 + b'"',
        b'device = "cuda:' + b"9" * 5000 + b'"',
        b'enable_numa = "' + b"x" * 5000 + b'"',
        b"transfer_timeout_s = " + b"9" * 400,
        b"".join(b"option_%d = 1\n" % at for at in range(5000)),
        b"x" * 5000 + b" = 1",
        b"\"" + b"x" * 5000 + b"\" = 1\n" b"\"" + b"x" * 5000 + b"\" = 1",
    ],
    ids=["latin-1", "nested", "digits", "63 bits", "text", "size", "device", "bool", "timeout", "names", "name", "twice"],
)
def test_whatever_a_file_holds_the_error_is_short(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kvortex.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        KVortexConfig.from_toml(path)
    assert len(str(caught.value)) < 900
    if b"= " + b"9" * 400 not in content and b"cuda:" not in content:  # those are refused by the option's own check
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("beside", ["block_size = 16", "blocksize = 16", 'model = "x"'])
def test_an_option_beside_the_table_is_refused_by_name(tmp_path: Path, beside: str) -> None:
    path = tmp_path / "kvortex.toml"
    path.write_text(f"{beside}\n[kvortex]\nrank = 0\n")
    with pytest.raises(ConfigError, match=rf"kvortex\.toml: '{beside.split()[0]}' beside the \[kvortex\] table"):
        KVortexConfig.from_toml(path)


@pytest.mark.parametrize("options", [None, 3, "block_size", [("block_size", 16)], {1: 2}, {"block_size": 16, 1: 2}, {None: 1}])
def test_what_is_no_mapping_of_names_is_refused(options: Any) -> None:
    for read in (KVortexConfig.from_mapping, KVortexConfig.from_env):
        if not (options is None and read == KVortexConfig.from_env):  # None stands for os.environ there
            with pytest.raises(ConfigError, match="must be a mapping of names|names of options are strings"):
                read(options)


def test_a_variable_in_two_spellings_is_refused() -> None:
    with pytest.raises(ConfigError, match="block_size is set twice"):
        KVortexConfig.from_env({"KVORTEX_BLOCK_SIZE": "16", "KVORTEX_block_size": "32"})


@pytest.mark.parametrize("name", ["block_size", "cpu_pool_size_bytes", "transfer_timeout_s"])
def test_digits_of_other_scripts_are_no_numbers(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        KVortexConfig.from_mapping({name: "٣"})


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_huge_value_makes_no_huge_message(name: str) -> None:
    for value in ("x" * 10**6, b"x" * 10**6, ["x"] * 10**6):
        chosen = name in ("device", "transfer_route", "eviction_policy", "codec")  # not any text
        if not (isinstance(value, str) and isinstance(GOOD[name][0], str) and not chosen):
            for make in (KVortexConfig, lambda **options: KVortexConfig.from_mapping(options)):
                with pytest.raises(ConfigError, match=name) as caught:
                    make(**{name: value})
                assert len(str(caught.value)) < 300


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="only Python 3.10 lacks tomllib")
def test_toml_without_tomli_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(ConfigError, match=r"pip install -e \"\.\[toml\]\" in the kvortex checkout"):
        KVortexConfig.from_toml(tmp_path / "kvortex.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        (" 7 B ", 7),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("512 MiB", 512 << 20),
        ("16GB", 16 * 10**9),
        ("16 gib", 16 << 30),
        ("3TiB", 3 << 40),
        ("0.5 GiB", 1 << 29),
        ("1.5kb", 1500),
        ("123456789012345678901", 123456789012345678901),
    ],
)
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


NO_SIZES = ["", "GiB", "-1", "1e9", "1 GiBs", "1,5 GiB", "1.", ".5", "0x10", "1 2", "inf", "1.0001 KiB", "٣ KiB"]


@pytest.mark.parametrize("text", NO_SIZES)
def test_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no "):
        parse_size(text)


UNITS = {"": 0, "B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


@given(st.integers(0, 2**70), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]), st.booleans())
def test_every_whole_size_is_read_exactly(number: int, unit: str, gap: str, upper: bool) -> None:
    text = f"{number}{gap}{unit.upper() if upper else unit}"
    assert parse_size(text) == number << UNITS[unit]


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ConfigError as error:
        assert shown(text) in str(error)


@given(st.decimals(0, 10**6, places=3, allow_nan=False), st.sampled_from(["KB", "MB", "GB"]))
def test_decimal_sizes_are_read_exactly(number: Decimal, unit: str) -> None:
    assert parse_size(f"{number:f} {unit}") == number * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[unit]


def test_tiers_are_few_urls() -> None:
    with pytest.raises(ConfigError, match="^tiers = .*17 of them, 16 at most"):
        KVortexConfig(tiers=("memory:",) * 17)
    with pytest.raises(ConfigError, match=r"^tiers\[1\] = '/var/cache/kv': must be a URL"):
        KVortexConfig(tiers=("memory:", "/var/cache/kv"))
