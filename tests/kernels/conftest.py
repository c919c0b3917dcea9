"""What runs in the simulator runs beside what is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.simulator import Simulated, Simulator, programs


@pytest.fixture(scope="session", autouse=True)
def _simulator(request: pytest.FixtureRequest) -> Iterator[Simulator]:
    """Begins, with the first test of this folder, what any test of the session asks for."""
    asking = {item.path for item in request.session.items if "simulated" in getattr(item, "fixturenames", ())}
    simulator = Simulator(programs(Path(path) for path in asking))
    yield simulator
    simulator.close()


@pytest.fixture
def simulated(_simulator: Simulator) -> Simulated:
    """What a program of this folder printed in the simulator; AssertionError with all of it if it failed."""
    return _simulator
