"""Results: where they were measured, as a table, as JSON, as a picture."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvortex

PACKAGES = ("numpy", "numba", "numba-cuda", "cuda-bindings", "cuda-core")


def environment(device: str) -> dict[str, Any]:
    """Device, driver, versions and date of a measurement."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": kvortex.open_device(device).describe(),
        "python": platform.python_version(),
        "kvortex": kvortex.__version__,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "kernel": platform.release(),
    }


@dataclass
class Report:
    """Rows of one measurement, each a flat mapping."""

    name: str
    command: str
    environment: dict[str, Any]
    notes: dict[str, Any]
    rows: list[dict[str, Any]]

    def table(self, columns: Sequence[str]) -> str:
        """The named columns as aligned text."""
        cells = [list(columns), *([_text(row[column]) for column in columns] for row in self.rows)]
        widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)

    def write(self, folder: Path, draw: Callable[[Any, Report], None]) -> list[Path]:
        """Writes ``NAME-DEVICE.json`` and, where matplotlib is installed, the picture beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        gpu = self.environment["device"].get("gpu", "host").lower().replace(" ", "-")
        path = folder / f"{self.name}-{gpu}.json"
        path.write_text(json.dumps(vars(self), indent=1) + "\n")
        try:
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot
        except ImportError:
            return [path]
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        draw(axes, self)
        figure.savefig(path.with_suffix(".png"), dpi=110)
        pyplot.close(figure)
        return [path, path.with_suffix(".png")]


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
