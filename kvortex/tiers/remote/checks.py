"""Options that tiers on other machines have alike. Raise ConfigError where a value is none."""

from __future__ import annotations

from kvortex.errors import ConfigError, shown


def check_count(name: str, value: object, least: int, most: int) -> None:
    """An integer within bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name} must be an integer from {least} to {most}, not {shown(value)}")


def check_connect_timeout(seconds: object) -> None:
    """``connect_timeout_s``."""
    if not isinstance(seconds, (int, float)) or not 0 < seconds <= 3600:
        raise ConfigError(f"connect_timeout_s must be above 0 and at most 3600 seconds, not {shown(seconds)}")
