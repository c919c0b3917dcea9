"""The kernels in Numba's simulator, against the obvious reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.cases import CASES


def test_gather_and_scatter_in_the_simulator() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.simulate"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("simulated ") == 9 * len(CASES) + 1
