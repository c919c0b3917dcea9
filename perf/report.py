"""Results: where they were measured, as a table, as JSON, as a picture."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kvortex
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import ArgumentError
from kvortex.transfer.profiles import store as profile_store

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy", "numba", "numba-cuda", "cuda-bindings", "cuda-core")
FOREIGN = ("torch", "cupy", "jax")  # told where a measurement imported them


def environment(device: str) -> dict[str, Any]:
    """Device, driver, versions, commit and date of a measurement, and whether transfers follow a measured profile."""
    opened = kvortex.open_device(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": opened.describe(),
        "calibrated": isinstance(opened, CudaDevice) and profile_store.load(opened) is not None,
        "python": platform.python_version(),
        "kvortex": kvortex.__version__,
        "commit": commit(ROOT),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {name: str(sys.modules[name].__version__) for name in FOREIGN if hasattr(sys.modules.get(name), "__version__")},
        "kernel": platform.release(),
    }


def commit(root: Path) -> str | None:
    """The commit that was measured, ``+dirty`` where files differ from it; None where ``root`` is no git checkout."""
    if not (root / ".git").exists():  # a copy in another checkout would have that one's commit
        return None
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        # Not those in perf/results: the measurement before this one wrote them.
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)perf/results")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+dirty" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def check_writable(folder: Path) -> None:
    """Before a measurement, not after it; by writing, and leaves nothing."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ArgumentError(f"--out {folder}: no file can be written there: {error.strerror or error}") from None


def progress(text: str) -> None:
    """What is being measured now, for whoever waits."""
    print(f"{text} …", file=sys.stderr, flush=True)


@dataclass
class Report:
    """Rows of one measurement, each a flat mapping.

    ``keys`` are the columns that name a row, ``better`` maps those that may be compared to ``"higher"`` or ``"lower"``.
    """

    name: str
    command: str
    environment: dict[str, Any]
    notes: dict[str, Any]
    rows: list[dict[str, Any]]
    keys: Sequence[str] = ()
    better: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """What was measured, for titles."""
        return str(self.environment["device"].get("gpu", "host device"))

    @property
    def wrong_bytes(self) -> int:
        """Of all rows together."""
        return sum(row.get("wrong_bytes", 0) for row in self.rows)

    def table(self, columns: Sequence[str]) -> str:
        """The named columns as aligned text; a dash where a row has none."""
        cells = [list(columns), *([_text(row.get(column, "-")) for column in columns] for row in self.rows)]
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
