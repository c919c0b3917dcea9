"""Tiers by name: ``disk:/var/cache/kv?capacity=100GiB``, ``redis://host:6379/0``, ``s3://bucket/prefix?mode=back``.

What stands behind ``?`` goes to the cascade where it knows the name (:class:`TierOptions`, and those of
:class:`BreakerOptions` with ``breaker_`` before them), and else to the module of the scheme, whose function
``open_url(url, options, form)`` makes the tier and refuses what it does not know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from kvortex.config import parse_size
from kvortex.errors import ConfigError, cut, shown, told
from kvortex.tiers.base import Tier
from kvortex.tiers.breaker import BreakerOptions
from kvortex.tiers.options import TierOptions
from kvortex.tiers.record import RecordFormat

# The module of each scheme. It is imported when a tier of it is opened, and may need an extra.
SCHEMES = {
    "disk": "kvortex.tiers.disk",
    "memory": "kvortex.tiers.memory",
    "mooncake": "kvortex.tiers.mooncake",
    "redis": "kvortex.tiers.redis",
    "rediss": "kvortex.tiers.redis",
    "s3": "kvortex.tiers.s3",
    "unix": "kvortex.tiers.redis",
}
_LOCAL = frozenset({"disk", "memory"})  # whose contains is a look into this process's memory
_BREAKER = "breaker_"
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


class OpenTier(NamedTuple):
    """A tier, and how it is to be treated."""

    tier: Tier
    options: TierOptions


def open_tiers(given: Any, form: RecordFormat) -> list[OpenTier]:
    """Opens tiers, from the fastest to the slowest. Where one cannot be opened, those before it are closed again.

    Parameters
    ----------
    given
        A sequence of URLs; of mappings with ``url`` and its options, as TOML has them; of functions that make a
        :class:`Tier` of a :class:`RecordFormat`; or of pairs of such a function and :class:`TierOptions`. The tiers are
        closed with the engine.
    form

    Raises
    ------
    ConfigError
        It is none of these, or the tier's module refuses it, or is missing.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"tiers = {shown(given)}: must be a sequence of URLs, tables or functions")
    with contextlib.ExitStack() as undo:
        found = []
        for entry in given:
            found.append(open_tier(entry, form))
            undo.callback(found[-1].tier.close)
        undo.pop_all()
    return found


def open_tier(entry: Any, form: RecordFormat) -> OpenTier:
    """One of them."""
    if callable(entry):
        return OpenTier(entry(form), TierOptions())
    if isinstance(entry, tuple) and len(entry) == 2 and callable(entry[0]) and isinstance(entry[1], TierOptions):
        return OpenTier(entry[0](form), entry[1])
    if isinstance(entry, str):
        return _open_url(entry, {}, form)
    if isinstance(entry, Mapping) and isinstance(entry.get("url"), str):
        return _open_url(entry["url"], {name: value for name, value in entry.items() if name != "url"}, form)
    raise ConfigError(f"tiers: {shown(entry)} is no URL, no table with a url, and makes no tier")


def _open_url(url: str, more: Mapping[str, Any], form: RecordFormat) -> OpenTier:
    bare, options, left = parse_url(url, more)
    scheme = urlsplit(bare).scheme
    name = SCHEMES[scheme]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"tier {hidden(bare)}: {name} cannot be imported: {told(error)}") from error
    if options.local is None and scheme in _LOCAL:
        options = dataclasses.replace(options, local=True)
    try:
        return OpenTier(module.open_url(bare, left, form), options)
    except ConfigError:
        raise
    except Exception as error:  # of a client library, or of the system
        raise ConfigError(f"tier {hidden(bare)}: {told(error)}") from error


def parse_url(url: str, more: Mapping[str, Any] | None = None) -> tuple[str, TierOptions, dict[str, Any]]:
    """The URL without its options, those of the cascade, and what is left for the scheme's own module."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ConfigError(f"tier {cut(hidden(url))}: unknown scheme; known are {', '.join(sorted(SCHEMES))}")
    given: dict[str, Any] = {}
    for name, value in (*parse_qsl(parts.query, keep_blank_values=True), *(more or {}).items()):
        if name in given:
            raise ConfigError(f"tier {hidden(url)}: {shown(name)} stands twice")
        given[name] = value
    mine = {entry.name: str(entry.type) for entry in dataclasses.fields(TierOptions) if entry.name != "breaker"}
    of_breaker = {_BREAKER + entry.name: str(entry.type) for entry in dataclasses.fields(BreakerOptions)}
    try:
        breaker = {name[len(_BREAKER) :]: value for name, value in _taken(given, of_breaker)}
        built = TierOptions(**dict(_taken(given, mine)), breaker=BreakerOptions(**breaker))
    except ConfigError as error:
        raise ConfigError(f"tier {hidden(url)}: {error}") from None
    return url.partition("?")[0], built, given


def _taken(given: dict[str, Any], kinds: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Takes the options of these names out, as what their kinds say."""
    return [(name, _value(name, given.pop(name), kind)) for name, kind in kinds.items() if name in given]


def _value(name: str, value: Any, kind: str) -> Any:
    if not isinstance(value, str) or kind == "str":
        return value
    try:
        if name.endswith("_bytes"):
            return parse_size(value)
        if kind.startswith("bool"):
            word = value.strip().lower()
            if word not in _TRUE | _FALSE:
                raise ValueError
            return word in _TRUE
        return float(value) if kind == "float" else int(value)
    except ValueError as error:
        why = f": {error}" if isinstance(error, ConfigError) else ""
        raise ConfigError(f"{name} = {shown(value)} is no {kind.partition(' ')[0]}{why}") from None


def hidden(url: str) -> str:
    """A URL without its password, for messages."""
    return re.sub(r"(//[^/@:]*):[^/@]*@", r"\1:***@", url)
