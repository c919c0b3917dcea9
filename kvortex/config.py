"""The options of an engine: one frozen dataclass, filled from keywords, the environment, or a TOML file."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from kvortex.errors import ConfigError, cut, shown, shown_tiers

ENV_PREFIX = "KVORTEX_"
ENV_NOT_OPTIONS = frozenset({"KVORTEX_CACHE_DIR"})  # read by kvortex.kernels.cache, not an option of the engine
_MOST = 2**63 - 1  # what NumPy, compiled code and the driver count with
_ROUTES = ("auto", "staged", "resident", "strided", "batched", "mapped")
_KEY_SCHEMES = ("kvortex", "vllm", "vllm-0.29", "vllm-0.20", "vllm-0.17", "vllm-0.15")
_CALIBRATE = ("never", "stored", "once")
_POLICIES = ("arc", "lfu", "lru", "s3fifo")
_CODECS = ("raw", "plane", "int8", "k6v4", "k4v4", "k4v3")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
# [0-9] and not \d, which takes the digits of every script.
_SIZE = re.compile(r"\s*([0-9]{1,99}(?:\.[0-9]{1,99})?)\s*([A-Za-z]*)\s*")
_MOST_TIERS = 16
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")
_NEXT_URL = re.compile(r",\s*(?=[a-z][a-z0-9+.-]*:)")  # options of a URL may have commas of their own
_DEVICE = re.compile(r"auto|host|cuda(:(0|[1-9][0-9]{0,5}))?")
_MOST_NAMED = 5  # of names that nobody knows
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


@dataclass(frozen=True, kw_only=True)
class KVortexConfig:
    """Options of a :class:`kvortex.KVortexEngine`.

    Parameters
    ----------
    cpu_pool_size_bytes
        Budget of the pinned host pool, in bytes. Never exceeded; what does not fill a whole slot is not allocated.
    gpu_pool_size_bytes
        Budget of the staging buffers in VRAM, in bytes, shared by both directions; None for as much as the GPU's profile says,
        with a codec up to four times that, as far as a 64th of the VRAM and half of what is free of it allow. The host device
        has none.
    num_transfer_streams
        Streams of each direction; None for as many as the profile says. Threads on the host device; None for 2.
    staging_buffers
        Staging buffers of each direction, which share the budget, and at least one a stream; None for the profile's number.
    calibrate
        Where the profile comes from: ``"never"`` guesses it from the link; ``"stored"`` takes the one that
        ``kvortex calibrate`` measured on a GPU of this kind, and guesses where there is none; ``"once"`` measures and stores
        it where there is none, which takes seconds.
    transfer_route
        How blocks cross the link: ``"staged"``, ``"resident"``, ``"strided"``, ``"batched"`` or ``"mapped"`` (see
        :class:`kvortex.transfer.routes.Route`), or ``"auto"`` to choose for each transfer. The host device has one way.
    beside_compute
        Whether a model computes on the GPU while blocks move, which ``transfer_route = "auto"`` then spares; None to take
        work on the caller's stream as the sign of it.
    link_share_beside_compute
        Of the link's rate, that long transfers through staging buffers take of each direction while a model computes, 0.01 to
        1, or a pair of that, of saves and of loads: the fewer bytes move, the less that costs the model
        (``docs/transfers.md``). A transfer that a stream is made to wait for is not held back; one that the host waits for is.
    eviction_policy
        Which block goes when a slot is needed: ``"lru"``, ``"s3fifo"``, ``"arc"`` or ``"lfu"``; see
        :data:`kvortex.index.POLICIES`.
    admit_after
        A block that is not in the cache is saved at the n-th ``save_blocks`` that asks for it, 1 to 255; before, the save's
        mask says that it is not there. From 2 on, what is asked for only once takes no slot and crosses no link.
    digests
        Compute a 128-bit digest of each block while it moves, keep it, and compare when the block is loaded: a block that is
        not what was saved is never handed out as if it were. See ``docs/digests.md``.
    codec
        What blocks become in the pool, and in tiers that have no codec of their own: ``"raw"``, as they lie in the pages;
        ``"plane"``, lossless, in 0.72 of the bytes or less; or, with loss, ``"int8"``, ``"k6v4"``, ``"k4v4"``, ``"k4v3"``,
        where each call is told which blocks begin a sequence. For bfloat16 pages. See ``docs/codecs.md``.
    codec_tables
        What a codec has learnt of the model's KV: a file that ``kvortex calibrate --tables`` writes. Also for codecs of tiers.
    enable_numa
        Bind the host pool to the GPU's NUMA node where the machine has several.
    device
        ``"cuda"``, ``"cuda:N"``, ``"host"``, or ``"auto"``: where the layout's tensors are, and without a layout a
        GPU if there is one, else the host.
    block_size
        Tokens in one block.
    max_block_bytes
        Bytes of the largest opaque buffer (``save_blocks(keys, data_ptrs, sizes)``). Needed only without a layout.
    model, dtype, rank, world_size, lora, salt
        Parts of the key namespace: blocks of engines that differ in one of them never share a key.
    record_trace
        File that the engine's requests are recorded in, as by :meth:`kvortex.KVortexEngine.record`; where it is there already,
        ``name-2.jsonl`` and so on. None for what the environment's ``KVORTEX_RECORD_TRACE`` says when the engine is made,
        so that engines can be recorded whose code is not at hand; empty for none whatever that says.
    key_scheme
        How :meth:`kvortex.KVortexEngine.block_keys` names blocks: ``"kvortex"``, or as vLLM does with ``sha256_cbor``:
        ``"vllm"`` (0.32 and newer), ``"vllm-0.29"``, ``"vllm-0.20"``, ``"vllm-0.17"``, ``"vllm-0.15"``. See
        ``docs/keys.md``.
    key_seed
        For vLLM's: ``PYTHONHASHSEED`` of its processes, as it is written there; None where it is not set.
    transfer_timeout_s
        Deadline in seconds of every wait that names none of its own.
    tiers
        Where blocks rest below RAM, the fastest first: URLs as ``"disk:/var/cache/kv?capacity=100GiB"``, tables of ``url``
        and its options, or functions that make tiers; see :func:`kvortex.tiers.urls.open_tiers`. In the environment a list of
        URLs, separated by commas.
    tier_pool_share
        The most of the pool that blocks may hold while they are written to tiers, and again those that are read from
        there, above 0 and up to 0.5; whatever it is, one block for each thread of a tier. While a tier hangs, saves have
        so many fewer.
    """

    cpu_pool_size_bytes: int = 1 << 30
    gpu_pool_size_bytes: int | None = None
    num_transfer_streams: int | None = None
    staging_buffers: int | None = None
    calibrate: str = "stored"
    transfer_route: str = "auto"
    beside_compute: bool | None = None
    link_share_beside_compute: float | tuple[float, float] = 0.92
    eviction_policy: str = "lru"
    admit_after: int = 1
    digests: bool = True
    codec: str = "raw"
    codec_tables: str | None = None
    enable_numa: bool = True
    device: str = "auto"
    block_size: int = 16
    max_block_bytes: int | None = None
    model: str = ""
    dtype: str = ""
    rank: int = 0
    world_size: int = 1
    lora: str = ""
    salt: str = ""
    record_trace: str | None = None
    key_scheme: str = "kvortex"
    key_seed: str | None = None
    transfer_timeout_s: float = 60.0
    tiers: tuple[Any, ...] = field(default=(), repr=False)  # may hold passwords
    tier_pool_share: float = 0.25

    def __post_init__(self) -> None:
        for name in ("cpu_pool_size_bytes", "block_size", "world_size"):
            self._integer(name, at_least=1)
        for name, most in (("gpu_pool_size_bytes", _MOST), ("num_transfer_streams", 32), ("staging_buffers", 32)):
            if getattr(self, name) is not None:
                self._integer(name, at_least=1, at_most=most)
        self._integer("admit_after", at_least=1, at_most=255)
        self._integer("rank", at_least=0)
        if self.rank >= self.world_size:
            raise ConfigError(f"rank = {self.rank}: must be below world_size = {self.world_size}")
        if self.max_block_bytes is not None:
            self._integer("max_block_bytes", at_least=1)
        for name in ("digests", "enable_numa"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} = {shown(getattr(self, name))}: must be true or false")
        if not isinstance(self.beside_compute, bool | None):
            raise ConfigError(f"beside_compute = {shown(self.beside_compute)}: must be true, false or None")
        names = ("model", "dtype", "lora", "salt", "device", "transfer_route", "calibrate", "eviction_policy", "key_scheme")
        for name in (*names, "codec"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} = {shown(getattr(self, name))}: must be a string")
        if not isinstance(self.record_trace, str | None):
            raise ConfigError(f"record_trace = {shown(self.record_trace)}: must be a string, the path of a file, or None")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device = {shown(self.device)}: must be 'auto', 'host', 'cuda' or 'cuda:N'")
        if self.transfer_route not in _ROUTES:
            raise ConfigError(f"transfer_route = {shown(self.transfer_route)}: must be one of {', '.join(_ROUTES)}")
        if self.codec not in _CODECS:
            raise ConfigError(f"codec = {shown(self.codec)}: must be one of {', '.join(_CODECS)}")
        if not isinstance(self.codec_tables, str | None):
            raise ConfigError(f"codec_tables = {shown(self.codec_tables)}: must be a string, the path of a file, or None")
        if self.key_scheme not in _KEY_SCHEMES:
            raise ConfigError(f"key_scheme = {shown(self.key_scheme)}: must be one of {', '.join(_KEY_SCHEMES)}")
        if not isinstance(self.key_seed, str | None):
            raise ConfigError(f"key_seed = {shown(self.key_seed)}: must be a string or None")
        if self.calibrate not in _CALIBRATE:
            raise ConfigError(f"calibrate = {shown(self.calibrate)}: must be one of {', '.join(_CALIBRATE)}")
        if self.eviction_policy not in _POLICIES:
            raise ConfigError(f"eviction_policy = {shown(self.eviction_policy)}: must be one of {', '.join(_POLICIES)}")
        self._check_tiers()
        given: Any = self.link_share_beside_compute
        if isinstance(given, list):  # as TOML has it
            object.__setattr__(self, "link_share_beside_compute", tuple(given))
        shares = self.link_shares
        if len(shares) != 2 or not all(_is_number(share) and 0.01 <= share <= 1 for share in shares):
            what = "must be a number from 0.01 to 1, or one for saves and one for loads"
            raise ConfigError(f"link_share_beside_compute = {shown(self.link_share_beside_compute)}: {what}")
        seconds = self.transfer_timeout_s
        # Compared as it is: an int may be too large for a float, and what is above the limit no wait can take.
        if not _is_number(seconds) or not 0 < seconds <= threading.TIMEOUT_MAX:
            span = f"above 0, {threading.TIMEOUT_MAX:.0f} at most"
            raise ConfigError(f"transfer_timeout_s = {shown(seconds)}: must be a number of seconds {span}")

    def _check_tiers(self) -> None:
        given: Any = self.tiers
        if not isinstance(given, (list, tuple)):
            raise ConfigError(f"tiers = {shown_tiers(given)}: must be a sequence of URLs, tables or functions")
        if len(given) > _MOST_TIERS:
            raise ConfigError(f"tiers = {shown_tiers(given)}: {len(given)} of them, {_MOST_TIERS} at most")
        for at, entry in enumerate(given):
            if isinstance(entry, str) and not _SCHEME.match(entry):
                raise ConfigError(f"tiers[{at}] = {shown_tiers(entry)}: must be a URL as disk:/folder or redis://host:6379/0")
        object.__setattr__(self, "tiers", tuple(given))  # a list, as TOML has it
        share = self.tier_pool_share
        if not _is_number(share) or not 0 < share <= 0.5:
            raise ConfigError(f"tier_pool_share = {shown(share)}: must be a number above 0, 0.5 at most")

    @property
    def link_shares(self) -> tuple[float, float]:
        """``link_share_beside_compute`` of saves and of loads."""
        given: Any = self.link_share_beside_compute
        return given if isinstance(given, tuple) else (given, given)

    def _integer(self, name: str, *, at_least: int, at_most: int = _MOST) -> None:
        check_integer(name, getattr(self, name), at_least, at_most)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], *, source: str = "options") -> KVortexConfig:
        """Config from names and values; strings are parsed (``"16 GiB"``, ``"true"``), unknown names are refused."""
        return cls(**_parsed(options, source))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> KVortexConfig:
        """Config from ``KVORTEX_CPU_POOL_SIZE_BYTES=16GiB`` and the like; keywords win."""
        return cls(**{**_from_environ(environ), **_parsed(overrides, "keyword")})

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], **overrides: Any) -> KVortexConfig:
        """Config from a TOML file, from its ``[kvortex]`` table if it has one, else its top level; keywords win.

        Beside a ``[kvortex]`` table there may be tables of other programs, and nothing else.
        """
        name = _path(path)
        source = cut(name.replace("\0", "\\0"), 200)
        return cls(**{**_parsed(_options(_read_toml(name, source), source), source), **_parsed(overrides, "keyword")})


_PAIR = "float | tuple[float, float]"
_WANTED = {"float": "number", _PAIR: "number, or two with a comma"}
_FIELDS = {field.name: str(field.type) for field in dataclasses.fields(KVortexConfig)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_integer(name: str, value: object, at_least: int, at_most: int) -> None:
    """ConfigError where the value of an option is no integer within bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        raise ConfigError(f"{name} = {shown(value)}: must be an integer from {at_least} to {at_most}")


def parse_size(text: str) -> int:
    """Bytes named by a string such as ``"4096"``, ``"512 MiB"`` or ``"16GB"``.

    Raises
    ------
    ConfigError
        The text is no size, or names a part of a byte.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{shown(text)} is no size: write bytes, or a number with KiB, MiB, GiB, TiB, KB, MB or GB")
    size = Fraction(match[1]) * unit
    if size.denominator != 1:
        raise ConfigError(f"{shown(text)} is no whole number of bytes")
    return size.numerator


def _from_environ(environ: Mapping[str, str] | None) -> dict[str, Any]:
    source = "environment " + ENV_PREFIX + "*"
    environ = _mapping(os.environ if environ is None else environ, source)
    options: dict[str, Any] = {}
    for variable in environ:
        if variable.startswith(ENV_PREFIX) and variable not in ENV_NOT_OPTIONS:
            name = variable[len(ENV_PREFIX) :].lower()
            if name in options:
                raise ConfigError(f"{source}: {cut(name)} is set twice, in capital and in small letters; unset one of them")
            options[name] = environ[variable]
    return _parsed(options, source)


def _mapping(options: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(options, Mapping):
        raise ConfigError(f"{source}: must be a mapping of names to values; seen: {shown(options)}")
    for name in options:
        if not isinstance(name, str):
            raise ConfigError(f"{source}: names of options are strings; seen: {shown(name)}")
    return options


def _parsed(options: Mapping[str, Any], source: str) -> dict[str, Any]:
    unknown = sorted(set(_mapping(options, source)) - set(_FIELDS))
    if unknown:
        raise ConfigError(f"{source}: unknown option {_named(unknown)}; known are {', '.join(sorted(_FIELDS))}")
    return {name: _value(name, value, source) for name, value in options.items()}


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(shown, names[:_MOST_NAMED])) + more


def _value(name: str, value: Any, source: str) -> Any:
    kind = _FIELDS[name]
    if not isinstance(value, str) or kind.startswith("str"):
        return value
    try:
        return _read(name, kind, value)
    except ConfigError as error:
        raise ConfigError(f"{source}: {name}: {error}") from None
    except ValueError:
        wanted = "number of seconds" if kind == "float" and name.endswith("_s") else _WANTED.get(kind, "integer")
        raise ConfigError(f"{source}: {name} = {shown(value)} is no {wanted}") from None


def _read(name: str, kind: str, text: str) -> Any:
    """The value that a text means; ValueError where it means none."""
    if kind.startswith("bool"):
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise ConfigError(f"{shown(text)} is neither true nor false")
        return word in _TRUE
    if name.endswith("_bytes"):
        return parse_size(text)
    if name == "tiers":
        return tuple(url.strip() for url in _NEXT_URL.split(text) if url.strip())
    if not text.isascii():  # int() and float() take the digits of every script
        raise ValueError
    if kind == _PAIR:
        shares = tuple(map(float, text.split(",")))
        return shares if len(shares) > 1 else shares[0]
    return float(text) if kind == "float" else int(text)


def _path(path: Any) -> str:
    """The name of a file; an integer is none, though ``open`` would take it for a descriptor, read it and close it."""
    try:
        return os.fsdecode(path)
    except TypeError:
        raise ConfigError(f"the path of a TOML file must be a string or a Path; seen: {shown(path)}") from None


def _options(table: dict[str, Any], source: str) -> dict[str, Any]:
    """The options of a TOML file. Where they have a table, an option beside it would be overlooked, so it is refused."""
    if "kvortex" not in table:
        return table
    options = table["kvortex"]
    if not isinstance(options, dict):
        raise ConfigError(f"{source}: 'kvortex' must be a table")
    beside = sorted(name for name, value in table.items() if name in _FIELDS or not isinstance(value, (dict, list)))
    if beside:
        raise ConfigError(f"{source}: {_named(beside)} beside the [kvortex] table; options belong into that table")
    return options


def _read_toml(path: str, source: str) -> dict[str, Any]:
    try:
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        cure = 'pip install -e ".[toml]" in the kvortex checkout'
        raise ConfigError(f"reading TOML on Python 3.10 needs tomli: {cure}") from None
    try:
        with open(path, "rb") as file:
            table: dict[str, Any] = tomllib.load(file)
            return table
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror or error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: tables or arrays are nested too deeply") from None
    except ValueError as error:  # no TOML, no UTF-8, a number of thousands of digits, or a path with a NUL
        raise ConfigError(f"{source}: {cut(str(error), 200)}") from None
