"""The picture of a replay: hit rate against pool size, a line a policy, and the bound above them."""

from __future__ import annotations

import importlib
import io
from typing import Any

from kvortex.errors import ArgumentError
from kvortex.traces.sweep import label

_LOOKS = ("o-", "s--", "^-.", "d:")


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
        Each with ``policy``, ``admit_after``, ``pool_blocks`` and ``prefix_hit_rate``.
    bounds
        Each with ``pool_blocks`` and ``hit_rate``.
    """
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    if bounds:
        points = sorted((row["pool_blocks"], row["hit_rate"]) for row in bounds)
        axes.plot(*_percent(points), "k:", marker="_", linewidth=1, label="the most there is (Belady)")
    lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for run in runs:
        lines.setdefault((run["policy"], run["admit_after"]), []).append((run["pool_blocks"], run["prefix_hit_rate"]))
    policies, offers = (list(dict.fromkeys(names)) for names in zip(*lines, strict=True))
    for (policy, admit_after), points in lines.items():  # a colour a policy, a line's look an admission
        look = _LOOKS[offers.index(admit_after) % len(_LOOKS)]
        color = f"C{policies.index(policy) % 10}"
        axes.plot(*_percent(sorted(points)), look, color=color, markersize=5, linewidth=1.2, label=label(policy, admit_after))
    axes.set_xscale("log")
    sizes = sorted({run["pool_blocks"] for run in runs})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_xlabel("blocks in the pool")
    axes.set_ylabel("prefix hits, % of all blocks asked for")
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.legend(loc="outside right upper", fontsize=8)  # beside the lines, of which there may be many
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def _percent(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [size for size, _ in points], [100 * rate for _, rate in points]
