"""Tiers by name: ``disk:/var/cache/kv?capacity=100GiB``, ``redis://host:6379/0``, ``s3://bucket/prefix?mode=back``.

What stands behind ``?`` goes to the cascade where it knows the name (:class:`TierOptions`, and those of
:class:`BreakerOptions` with ``breaker_`` before them), and else to the tier (``schemes.py``), which refuses what it does not
know.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from kvortex.errors import ConfigError, cut, hidden, shown, shown_tiers, told
from kvortex.tiers.base import Tier
from kvortex.tiers.breaker import BreakerOptions
from kvortex.tiers.codings import TierCoding
from kvortex.tiers.options import TierOptions
from kvortex.tiers.record import RecordFormat
from kvortex.tiers.schemes import SCHEMES, value_of

_BREAKER = "breaker_"


class OpenTier(NamedTuple):
    """A tier, how it is to be treated, and what its records are, where that is not what slots hold."""

    tier: Tier
    options: TierOptions
    coding: TierCoding | None = None


def open_tiers(given: Any, form: RecordFormat, codings: Sequence[TierCoding | None] = ()) -> list[OpenTier]:
    """Opens tiers, from the fastest to the slowest. Where one cannot be opened, those before it are closed again.

    Parameters
    ----------
    given
        A sequence of URLs; of mappings with ``url`` and its options, as TOML has them; of functions that make a
        :class:`Tier` of a :class:`RecordFormat`; or of pairs of such a function and :class:`TierOptions`. The tiers are
        closed with the engine.
    form
        Of what slots hold.
    codings
        Of each tier; none at all where every tier keeps what slots hold.

    Raises
    ------
    ConfigError
        It is none of these, or the tier's module refuses it, or is missing.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"tiers = {shown_tiers(given)}: must be a sequence of URLs, tables or functions")
    with contextlib.ExitStack() as undo:
        found = []
        for entry, coding in zip(given, codings or [None] * len(given), strict=True):
            found.append(open_tier(entry, form, coding))
            undo.callback(found[-1].tier.close)
        undo.pop_all()
    return found


def open_tier(entry: Any, form: RecordFormat, coding: TierCoding | None = None) -> OpenTier:
    """One of them; ConfigError too where its options name a codec and nobody has made it."""
    options = options_of(entry)
    if options.codec not in (None, "raw") and coding is None:
        named = isinstance(entry, (str, Mapping))
        what = f"the blocks of {f'tier {shown_tiers(entry)}' if named else 'this tier'} are not coded"
        raise ConfigError(f"codec = {shown(options.codec)}: {what}; leave it out")
    form = form if coding is None else coding.format_from(form)
    if callable(entry):
        return OpenTier(entry(form), options, coding)
    if isinstance(entry, tuple):
        return OpenTier(entry[0](form), options, coding)
    opened = _open_url(*_url_of(entry), form)
    return OpenTier(opened.tier, opened.options, coding)


def options_of(entry: Any) -> TierOptions:
    """How a tier is to be treated, by an entry of :func:`open_tiers`, which need not be opened."""
    if callable(entry):
        return TierOptions()
    if isinstance(entry, tuple) and len(entry) == 2 and callable(entry[0]) and isinstance(entry[1], TierOptions):
        return entry[1]
    return parse_url(*_url_of(entry))[1]


def _url_of(entry: Any) -> tuple[str, Mapping[str, Any]]:
    """A URL, and options beside it."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and isinstance(entry.get("url"), str):
        return entry["url"], {name: value for name, value in entry.items() if name != "url"}
    raise ConfigError(f"tiers: {shown_tiers(entry)} is no URL, no table with a url, and makes no tier")


def _open_url(url: str, more: Mapping[str, Any], form: RecordFormat) -> OpenTier:
    bare, options, left = parse_url(url, more)
    scheme = SCHEMES[bare.partition(":")[0]]
    if options.local is None and scheme.local:
        options = dataclasses.replace(options, local=True)
    try:
        return OpenTier(scheme.open(bare, left, form), options)
    except ImportError as error:
        raise ConfigError(f"tier {hidden(bare)}: {scheme.module} cannot be imported: {told(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"tier {hidden(bare)}: {hidden(str(error))}") from None
    except Exception as error:  # of a client library, or of the system
        why = cut(hidden(f"{type(error).__name__}: {error}"), 200)
        raise ConfigError(f"tier {hidden(bare)}: {why}") from error


def parse_url(url: str, more: Mapping[str, Any] | None = None) -> tuple[str, TierOptions, dict[str, Any]]:
    """The URL without its options, those of the cascade, and what is left for the tier."""
    bare, _, query = url.partition("?")
    if bare.partition(":")[0] not in SCHEMES or ":" not in bare:
        raise ConfigError(f"tier {cut(hidden(url))}: unknown scheme; known are {', '.join(sorted(SCHEMES))}")
    given: dict[str, Any] = {}
    for name, value in (*parse_qsl(query, keep_blank_values=True), *(more or {}).items()):
        if name in given:
            raise ConfigError(f"tier {hidden(bare)}: {shown(name)} stands twice")
        given[name] = value
    mine = {entry.name: str(entry.type) for entry in dataclasses.fields(TierOptions) if entry.name != "breaker"}
    of_breaker = {_BREAKER + entry.name: str(entry.type) for entry in dataclasses.fields(BreakerOptions)}
    try:
        breaker = {name[len(_BREAKER) :]: value for name, value in _taken(given, of_breaker)}
        built = TierOptions(**dict(_taken(given, mine)), breaker=BreakerOptions(**breaker))
    except ConfigError as error:
        raise ConfigError(f"tier {hidden(bare)}: {error}") from None
    return bare, built, given


def _taken(given: dict[str, Any], kinds: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Takes the options of these names out, as what their kinds say."""
    return [(name, value_of(name, given.pop(name), kind)) for name, kind in kinds.items() if name in given]
