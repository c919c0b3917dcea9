"""The kernels in Numba's simulator, against the obvious reference."""

from __future__ import annotations

from tests.kernels.cases import CASES
from tests.kernels.simulator import Simulated


def test_gather_and_scatter_in_the_simulator(simulated: Simulated) -> None:
    assert simulated("simulate").count("simulated ") == 9 * len(CASES) + 1
