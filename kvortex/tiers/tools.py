"""What can be asked of a tier without an engine: what it holds, whether that is whole, that it goes, and whether it works."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
import time
from pathlib import Path
from typing import Any

from kvortex.codecs import Tables, make_codec
from kvortex.errors import ArgumentError, CodecError, ConfigError, hidden, told
from kvortex.tiers.base import Call
from kvortex.tiers.options import TierOptions
from kvortex.tiers.record import RecordFormat
from kvortex.tiers.schemes import SCHEMES, Scheme
from kvortex.tiers.urls import open_tier, parse_url

_PROBE_BYTES = 64 << 10
_PROBE_NAMESPACE = b"kvortex-probe".ljust(32, b".")  # of no engine: theirs are digests
_PROBE_CAPACITY = "4MiB"
ACTIONS = {"ls": "listing", "verify": "verify", "purge": "purge"}


def act(action: str, url: str) -> list[dict[str, Any]]:
    """Does one of :data:`ACTIONS` to a tier.

    Returns
    -------
    list of dict
        What each of its parts (the folders of a disk tier) said.

    Raises
    ------
    ConfigError
        The URL, or what it names, is not as it should be.
    ArgumentError
        A tier of this kind cannot be asked that.
    """
    bare, _, given = parse_url(url)
    scheme = SCHEMES[bare.partition(":")[0]]
    try:
        module = importlib.import_module(scheme.module)
    except ImportError as error:
        raise ConfigError(f"tier {hidden(bare)}: {scheme.module} cannot be imported: {told(error)}") from error
    function = getattr(module, ACTIONS[action], None)
    if function is None:
        raise ArgumentError(f"tier {action} {hidden(bare)}: not for tiers of this kind; use the tools of its server")
    return [_facts(scheme, target, function(target)) for target in _targets(scheme, bare, given)]


def _targets(scheme: Scheme, bare: str, given: dict[str, Any]) -> Any:
    return scheme.targets(bare) if scheme.targets is not None else [scheme.options_of(bare, given)]


def _facts(scheme: Scheme, target: Any, found: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return dataclasses.asdict(found)
    return ({"path": str(target)} if scheme.targets is not None else {}) | {"removed_bytes": int(found)}


def probe(entry: Any, codec_tables: str | None = None) -> str:
    """Whether a tier of a config works, in words; leaves nothing.

    A store is asked to keep a small record, to give it back, and to forget it. Of a disk tier's folders, which one engine has
    to itself, that is asked of a folder beside each. Where the tier has a codec, ``codec_tables`` must do for it.
    """
    try:
        url, more = (entry, {}) if isinstance(entry, str) else (entry["url"], {k: v for k, v in entry.items() if k != "url"})
        bare, options, given = parse_url(url, more)
        scheme = SCHEMES[bare.partition(":")[0]]
        _check_codec(options, codec_tables)
        if scheme.targets is None:
            return _probed({"url": bare, **given}, options.read_timeout_s)
        told = [_probed_beside(bare.partition(":")[0], Path(folder), options.read_timeout_s) for folder in scheme.targets(bare)]
        return next((text for text in told if not text.startswith("works")), told[0] if told else "no folder is named")
    except Exception as error:  # whatever it is, it is what is asked
        return f"does not work: {hidden(str(error))}"


def _check_codec(options: TierOptions, codec_tables: str | None) -> None:
    """ConfigError where an engine would refuse the codec, as far as its tables tell."""
    if options.codec in (None, "raw"):
        return
    if not codec_tables:
        raise ConfigError(f"codec = {options.codec!r}: needs codec_tables (KVORTEX_CODEC_TABLES)")
    level = {} if options.codec_level is None else {"level": options.codec_level}
    try:
        tables, shape = Tables.load(codec_tables)
        make_codec(str(options.codec), shape, tables, **level)
    except CodecError as error:
        raise ConfigError(f"codec = {options.codec!r}: {error}") from error


def _probed_beside(scheme: str, folder: Path, timeout: float) -> str:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".kvortex-probe-", dir=there) as beside:
        return _probed(f"{scheme}:{beside}?capacity={_PROBE_CAPACITY}", timeout)


def _probed(entry: Any, timeout: float) -> str:
    began = time.monotonic()
    tier = open_tier(entry, RecordFormat(_PROBE_NAMESPACE, _PROBE_BYTES)).tier
    try:
        wrong = tier.probe(Call(time.monotonic() + timeout))
    finally:
        tier.close()
    took = time.monotonic() - began
    return f"works: opened and probed in {1e3 * took:.0f} ms" if wrong is None else f"does not work: {hidden(wrong)}"
