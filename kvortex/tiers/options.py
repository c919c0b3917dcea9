"""How the cascade treats one tier."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from kvortex.codecs.cachegen import LEVELS
from kvortex.codecs.registry import CODECS
from kvortex.config import check_integer
from kvortex.errors import ConfigError, shown
from kvortex.tiers.breaker import BreakerOptions, check_seconds

MODES = ("through", "back", "read")
_MOST = {"admit_after": 255, "write_threads": 64, "read_threads": 64, "codec_threads": 64, "known_keys": 1 << 28}


@dataclass(frozen=True, kw_only=True)
class TierOptions:
    """What a tier gets, when, and how long it may take.

    Parameters
    ----------
    mode
        ``"through"`` writes each block soon after it was saved. ``"back"`` waits: a block is written ``write_delay_s`` after
        it was saved, or when blocks of half the pool wait, the oldest first, and at a flush; what RAM evicts before is lost to
        this tier, and counted. ``"read"`` writes nothing.
    write_delay_s
        Of write-back.
    read_timeout_s, write_timeout_s
        Deadline of each call with one batch.
    write_threads, read_threads
        Of this tier, and so the most calls at a time of each kind.
    batch_blocks, batch_bytes
        Of one call at most, but for a single larger block.
    queue_blocks, queue_bytes
        That may wait to be written; what is beyond that is not stored, and counted.
    admit_after
        A block is stored at the n-th time that it is offered, 1 to 255.
    least_bytes, most_bytes
        Of a block that is stored here; None for no bound.
    fresh_s
        Seconds that a key counts as being there since it was seen there. A shared store may have lost it meanwhile.
    absent_s
        Seconds that a key which was not there is not asked for again.
    known_keys
        Keys that are remembered of each sort, 200 bytes each.
    local
        Whether ``contains`` costs no round trip, so that it is asked whenever somebody wants to know; None for what the tier
        says.
    codec
        What blocks become on their way to this tier, and come back from: ``"raw"``, ``"plane"``, or with loss ``"int8"``,
        ``"k6v4"``, ``"k4v4"``, ``"k4v3"``, ``"cachegen"``; above it a pool that loses nothing. None for what the pool's slots
        hold. See ``docs/codecs.md``.
    codec_level
        Of ``cachegen``: 0 to 2, from fine to coarse; None for 1.
    codec_threads
        That may code blocks of this tier at a time, for each batch: the thread that reads or writes it, and others beside it.
    breaker
    """

    mode: str = "through"
    write_delay_s: float = 30.0
    read_timeout_s: float = 2.0
    write_timeout_s: float = 10.0
    write_threads: int = 1
    read_threads: int = 2
    batch_blocks: int = 64
    batch_bytes: int = 64 << 20
    queue_blocks: int = 8192
    queue_bytes: int = 4 << 30
    admit_after: int = 1
    least_bytes: int | None = None
    most_bytes: int | None = None
    fresh_s: float = 60.0
    absent_s: float = 1.0
    known_keys: int = 1 << 16
    local: bool | None = None
    codec: str | None = None
    codec_level: int | None = None
    codec_threads: int = 4
    breaker: BreakerOptions = field(default_factory=BreakerOptions)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode = {shown(self.mode)}: must be one of {', '.join(MODES)}")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type == "float":
                check_seconds(entry.name, value)
            elif entry.type == "int" or (entry.type == "int | None" and value is not None and entry.name != "codec_level"):
                check_integer(entry.name, value, 1, _MOST.get(entry.name, 1 << 62))
        self._check_codec()
        if not isinstance(self.local, bool | None):
            raise ConfigError(f"local = {shown(self.local)}: must be true, false or None")
        if not isinstance(self.breaker, BreakerOptions):
            raise ConfigError(f"breaker = {shown(self.breaker)}: must be BreakerOptions")

    def _check_codec(self) -> None:
        if self.codec is not None and (not isinstance(self.codec, str) or self.codec not in CODECS):
            raise ConfigError(f"codec = {shown(self.codec)}: must be one of {', '.join(CODECS)}")
        if self.codec_level is None:
            return
        check_integer("codec_level", self.codec_level, 0, len(LEVELS) - 1)
        if self.codec != "cachegen":
            raise ConfigError(f"codec_level = {self.codec_level}: only cachegen has levels, and codec = {shown(self.codec)}")
