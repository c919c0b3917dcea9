"""Profiles in words: how transfers on a GPU are shaped."""

from __future__ import annotations

from kvortex.transfer.executor import Direction
from kvortex.transfer.profiles.profile import Profile
from kvortex.transfer.routes import Ability, tabulate


def facts(profile: Profile) -> dict[str, str]:
    """A profile in words."""
    found = {
        "link": f"{profile.link_rate / 1e9:.1f} GB/s",
        "copy that is worth a call": size(profile.copy_bytes),
        "streams": str(profile.streams),
        "staging buffers": f"{max(profile.buffers, profile.streams)} of {size(profile.buffer_bytes)} each way",
        "CTAs of a resident kernel": f"{profile.resident_ctas}, beside compute {profile.resident_ctas_beside}",
        "CTAs of a staged launch": str(profile.staged_ctas),
    }
    for direction in Direction:
        for beside in (False, True):
            name = f"{direction.value} beside compute" if beside else direction.value
            found[name] = _routes(profile, direction, beside)
    return found


def _routes(profile: Profile, direction: Direction, beside: bool) -> str:
    """The best route by length of fragments and payload, where every route can run: ``"mapped, resident from 4 MiB"``."""
    told: list[tuple[int, str]] = []
    mine = [row for row in profile.rankings if row.direction is direction and row.beside_compute is beside]
    for length in sorted({row.fragment_bytes for row in mine}):
        able = Ability(length, strided=True, batched=True, resident=True, deep=True)
        least, routes = tabulate(profile.rankings, able)[direction, beside, False]
        changes = [at for at in range(len(routes)) if not at or routes[at] is not routes[at - 1]]
        words = [routes[at].value + (f" from {size(least[at])}" if least[at] else "") for at in changes]
        if not told or told[-1][1] != ", ".join(words):
            told.append((length, ", ".join(words)))
    if len(told) == 1:
        return told[0][1]
    return "; ".join(f"fragments from {size(length)} on: {text}" if length else text for length, text in told)


def size(nbytes: int) -> str:
    """``"256 KiB"``."""
    for unit, step in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= step:
            return f"{nbytes / step:.3g} {unit}"
    return f"{nbytes} bytes"
