"""Fixtures of all tests: the devices they run on, and a cache folder of their own."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from kvortex.devices import Device

# A busy machine of two cores is no failure, and a failing example is printed: nothing need be kept on disk.
settings.register_profile("kvortex", deadline=None, database=None, print_blob=True)
settings.load_profile("kvortex")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked ``gpu`` where no GPU can be used, and says why not."""
    if item.get_closest_marker("gpu") is not None:
        from kvortex.devices import cuda_available

        available, reason = cuda_available()
        if not available:
            pytest.skip(f"no GPU: {reason}")


@pytest.fixture(scope="module", autouse=True)
def _collected() -> None:
    """What modules before have left, and compilers above all, is not looked through again by each collection of a test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """Each device in turn; the same test must hold on both."""
    from kvortex.devices import open_device

    return open_device(request.param)
