"""The kernels in Numba's simulator, against the obvious reference."""

from __future__ import annotations

from tests.kernels.beside import Simulated
from tests.kernels.cases import CASES


def test_gather_and_scatter_in_the_simulator(simulated: Simulated) -> None:
    assert simulated("simulate").count("simulated ") == 9 * len(CASES) + 1
