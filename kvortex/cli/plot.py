"""The picture of a replay: hit rate against pool size, a line a policy, and the bound above them."""

from __future__ import annotations

import importlib
import io
from typing import Any

from kvortex.errors import ArgumentError

_MARKERS = "osD^vP*Xh<>"


def check_installed() -> None:
    """Before the work.

    Raises
    ------
    ArgumentError
        matplotlib is not there.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        cure = 'pip install -e ".[plot]" in the kvortex checkout'
        raise ArgumentError(f"--plot needs matplotlib: {cure}; --json writes the same numbers") from None


def draw(title: str, runs: list[dict[str, Any]], bounds: list[dict[str, Any]]) -> bytes:
    """A PNG.

    Parameters
    ----------
    title
    runs
        Each with ``policy``, ``pool_blocks`` and ``prefix_hit_rate``.
    bounds
        Each with ``pool_blocks`` and ``hit_rate``.
    """
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if bounds:
        points = sorted((row["pool_blocks"], row["hit_rate"]) for row in bounds)
        axes.plot(*_percent(points), "k--", marker="_", linewidth=1, label="Belady's MIN: no policy can have more")
    for at, policy in enumerate(dict.fromkeys(run["policy"] for run in runs)):
        points = sorted((run["pool_blocks"], run["prefix_hit_rate"]) for run in runs if run["policy"] == policy)
        axes.plot(*_percent(points), marker=_MARKERS[at % len(_MARKERS)], markersize=5, linewidth=1.2, label=policy)
    axes.set_xscale("log")
    sizes = sorted({run["pool_blocks"] for run in runs})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_xlabel("blocks in the pool")
    axes.set_ylabel("prefix hits, % of all blocks asked for")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def _percent(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [size for size, _ in points], [100 * rate for _, rate in points]
