"""What runs in the simulator, and what compiles every kernel, begins with the session, and runs beside all its tests."""

from __future__ import annotations

import pytest

from tests.kernels import compiled
from tests.kernels.beside import Beside, Simulated, programs

_beside = pytest.StashKey[Beside]()
_MANY = 50  # kernels to compile: less is not worth compiling all


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    asking = {item.path for item in session.items if "simulated" in getattr(item, "fixturenames", ())}
    compiling = [item for item in session.items if "test_every_kernel_compiles" in item.name]
    if asking or len(compiling) >= _MANY:
        session.config.stash[_beside] = beside = Beside(programs(asking), compiles=len(compiling) >= _MANY)
        compiled.elsewhere = beside.compiled


def pytest_sessionfinish(session: pytest.Session) -> None:
    beside = session.config.stash.get(_beside, None)
    if beside is not None:
        compiled.elsewhere = compiled.nowhere
        beside.close()


@pytest.fixture
def simulated(request: pytest.FixtureRequest) -> Simulated:
    """What a program of this folder printed in the simulator; AssertionError with all of it if it failed."""
    return request.config.stash[_beside].simulated
