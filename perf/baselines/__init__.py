"""What users would pick instead of kvortex, working on the same pages: one class each."""

from __future__ import annotations

from kvortex.errors import DeviceUnavailableError
from perf.baselines.base import Baseline
from perf.baselines.fragmentwise import Batched, PerFragment
from perf.baselines.gather import CupyGather, TorchGather
from perf.pages import Pages

ALL: tuple[type[Baseline], ...] = (PerFragment, Batched, CupyGather, TorchGather)

__all__ = ["ALL", "Baseline", "Batched", "CupyGather", "PerFragment", "TorchGather", "open_baseline", "open_baselines"]


def open_baseline(kind: type[Baseline], pages: Pages, notes: dict[str, str]) -> Baseline | None:
    """One of :data:`ALL`, None where it cannot run; ``notes`` gets how it works, or why it is not there."""
    try:
        found = kind(pages)
    except DeviceUnavailableError as error:
        notes[kind.name] = f"not compared: {error}"
        return None
    notes[kind.name] = kind.how
    return found


def open_baselines(pages: Pages, notes: dict[str, str]) -> list[Baseline]:
    """All that can run; see :func:`open_baseline`."""
    found: list[Baseline] = []
    try:
        for kind in ALL:
            if (baseline := open_baseline(kind, pages, notes)) is not None:
                found.append(baseline)
    except BaseException:
        for baseline in found:
            baseline.close()
        raise
    return found
