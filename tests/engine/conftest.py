"""Where engines with a codec run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kvortex.devices import Device, open_device
from kvortex.devices.cuda import CudaDevice
from tests.fake_gpu import fake_gpu


@pytest.fixture
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The host, a GPU made of RAM, or a GPU, as a test says by its parameters; else the host."""
    name = getattr(request, "param", "host")
    with fake_gpu(monkeypatch) if name == "fake" else contextlib.nullcontext():
        yield CudaDevice() if name == "fake" else open_device(name)
