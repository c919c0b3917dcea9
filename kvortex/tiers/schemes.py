"""Which kind of tier a URL's scheme means, and what its parts and options mean to that."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from kvortex.config import parse_size
from kvortex.errors import ConfigError, shown
from kvortex.tiers.base import Tier
from kvortex.tiers.record import RecordFormat

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}
_SHORT = {"capacity": "capacity_bytes"}


@dataclass(frozen=True)
class Scheme:
    """One kind.

    Parameters
    ----------
    module, options, tier
        Where its dataclass of options and its class are; a tier is made of these options and a :class:`RecordFormat`.
    parts
        What a URL without its options says, by names of those fields.
    keeps_others
        Options of other names stay in the URL, for a client library that reads them there.
    local
        Whether to ask for keys costs no round trip.
    targets
        What the module's ``listing``, ``verify`` and ``purge`` take, one after the other; None for its options.
    """

    module: str
    options: str
    tier: str
    parts: Callable[[str], dict[str, Any]]
    keeps_others: bool = False
    local: bool = False
    targets: Callable[[str], Sequence[Any]] | None = None

    def open(self, url: str, given: Mapping[str, Any], form: RecordFormat) -> Tier:
        """The tier. ConfigError for an option that it does not have, or its module refuses."""
        options = self.options_of(url, given)
        tier: Tier = getattr(importlib.import_module(self.module), self.tier)(options, form)
        return tier

    def options_of(self, url: str, given: Mapping[str, Any]) -> Any:
        """The tier's own options."""
        kind = getattr(importlib.import_module(self.module), self.options)
        kinds = {entry.name: str(entry.type) for entry in dataclasses.fields(kind)}
        if twice := [name for short, name in _SHORT.items() if short in given and name in given]:
            raise ConfigError(f"{shown(twice[0])} stands twice")
        named = {_SHORT.get(name, name): value for name, value in given.items()}
        if others := {name: value for name, value in named.items() if name not in kinds}:
            if not self.keeps_others:
                known = ", ".join(sorted(set(kinds) - set(self.parts(url))))
                raise ConfigError(f"unknown option {', '.join(map(shown, sorted(others)))}; known are {known}")
            url += "?" + urlencode(others)
        chosen = {name: value_of(name, value, kinds[name]) for name, value in named.items() if name in kinds}
        missing = [entry.name for entry in dataclasses.fields(kind) if _is_required(entry)]
        said = self.parts(url)
        if both := [name for name in chosen if said.get(name)]:
            raise ConfigError(f"{shown(both[0])} stands twice: the URL says it before its '?'")
        values = said | chosen
        if absent := [name for name in missing if name not in values]:
            raise ConfigError(f"{', '.join(absent)} must be given")
        return kind(**values)


def _is_required(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def value_of(name: str, value: Any, kind: str) -> Any:
    """What a text means, for an option of that annotation; what is no text stays as it is."""
    if not isinstance(value, str) or kind.startswith("str"):
        return value
    try:
        if name.endswith("_bytes"):
            return parse_size(value)
        if kind.startswith("bool"):
            word = value.strip().lower()
            if word not in _TRUE | _FALSE:
                raise ValueError
            return word in _TRUE
        if kind.startswith(("int", "float")):
            return float(value) if kind.startswith("float") else int(value)
        return value
    except ValueError as error:
        why = f": {error}" if isinstance(error, ConfigError) else ""
        raise ConfigError(f"{name} = {shown(value)} is no {kind.partition(' ')[0]}{why}") from None


def _of_disk(url: str) -> dict[str, Any]:
    folders = url.partition(":")[2]
    return {"paths": tuple(folder for folder in folders.split(",") if folder)}


def _of_s3(url: str) -> dict[str, Any]:
    if "@" in url:  # not shown: what is before it may be a key
        raise ConfigError("the URL of an S3 tier has no login: give access_key_id and secret_access_key, or as AWS does")
    bucket, _, prefix = url.partition("://")[2].partition("/")
    return {"bucket": bucket} | ({"prefix": prefix.strip("/")} if prefix.strip("/") else {})


def _folders(url: str) -> tuple[str, ...]:
    return tuple(_of_disk(url)["paths"])


def _of_memory(url: str) -> dict[str, Any]:
    return {"name": url.partition(":")[2]}


def _of_url(url: str) -> dict[str, Any]:
    return {"url": url}


_REDIS = Scheme("kvortex.tiers.redis", "RedisOptions", "RedisTier", _of_url, keeps_others=True)
SCHEMES = {
    "disk": Scheme("kvortex.tiers.disk", "DiskOptions", "DiskTier", _of_disk, local=True, targets=_folders),
    "memory": Scheme("kvortex.tiers.memory", "MemoryOptions", "MemoryTier", _of_memory, local=True),
    "mooncake": Scheme("kvortex.tiers.mooncake", "MooncakeOptions", "MooncakeTier", _of_url),
    "redis": _REDIS,
    "rediss": _REDIS,
    "s3": Scheme("kvortex.tiers.s3", "S3Options", "S3Tier", _of_s3),
    "unix": _REDIS,
}
