"""Programs of this folder in Numba's simulator: in a process each, since it is chosen when ``numba.cuda`` is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def simulated(name: str) -> str:
    """What ``tests.kernels.NAME`` prints; AssertionError with all of it if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{name}"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
