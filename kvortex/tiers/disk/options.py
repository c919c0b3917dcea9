"""What a disk tier is told, checked before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from kvortex.config import check_integer
from kvortex.errors import ConfigError, shown
from kvortex.index import POLICIES

SYNCS = ("none", "group", "dsync")
_MOST = 2**63 - 1
_MOST_THREADS = 64


@dataclass(frozen=True, kw_only=True)
class DiskOptions:
    """Options of a :class:`kvortex.tiers.disk.DiskTier`.

    Parameters
    ----------
    paths
        Folders, best one for each drive; one path may be given as it is. Records are dealt over them. What is missing is made,
        with mode 0700. A folder has one owner at a time.
    capacity_bytes
        Of all files together. Never exceeded; what does not fill a whole slot is not allocated.
    policy
        What is evicted next; see :data:`kvortex.index.POLICIES`.
    sync
        What outlives a loss of power. ``"none"``: nothing is promised. ``"group"``: what was stored ``sync_seconds`` and one
        flush of the drive ago. ``"dsync"``: what was stored. Whatever it is, wrong bytes are never handed out, and
        ``kill -9`` loses nothing that was stored.
    sync_seconds
        Between two flushes under ``"group"``.
    readers, writers
        How many records are read, and written, at once, in all calls together.
    direct
        Keep out of the page cache (O_DIRECT) where the file system can. Off, the kernel caches records in memory that the
        pool in RAM might have had.
    reset
        Start empty where a folder holds records of another namespace or size, or something else; without it that is refused.
    """

    paths: Sequence[str | os.PathLike[str]]
    capacity_bytes: int
    policy: str = "lru"
    sync: str = "none"
    sync_seconds: float = 1.0
    readers: int = 4
    writers: int = 4
    direct: bool = True
    reset: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", _paths(self.paths))
        for name, most in (("capacity_bytes", _MOST), ("readers", _MOST_THREADS), ("writers", _MOST_THREADS)):
            check_integer(name, getattr(self, name), 1, most)
        for name, known in (("policy", tuple(sorted(POLICIES))), ("sync", SYNCS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ConfigError(f"{name} = {shown(value)}: must be one of {', '.join(known)}")
        seconds = self.sync_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= 3600:
            raise ConfigError(f"sync_seconds = {shown(seconds)}: must be a number of seconds above 0, 3600 at most")
        for name in ("direct", "reset"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} = {shown(getattr(self, name))}: must be true or false")


def _paths(given: object) -> tuple[str, ...]:
    """The folders as absolute paths, all different."""
    several = (given,) if isinstance(given, (str, os.PathLike)) else given
    if not isinstance(several, Sequence) or isinstance(several, (bytes, bytearray)) or not several:
        raise ConfigError(f"paths = {shown(given)}: must be a folder, or a sequence of them, one for each drive")
    for path in several:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path) or "\0" in str(path):
            raise ConfigError(f"paths: {shown(path)} is no path of a folder")
    found = tuple(os.path.realpath(os.fsdecode(path)) for path in several)
    if len(set(found)) != len(found):
        raise ConfigError(f"paths = {shown(given)}: names a folder twice; each has one slab")
    return found
