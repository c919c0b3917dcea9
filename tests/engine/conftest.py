"""Where engines with a codec run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvortex.devices import Device, open_device
from kvortex.devices.cuda import CudaDevice
from tests.engine.coded import Coded
from tests.fake_gpu import fake_gpu


@pytest.fixture
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The host, a GPU made of RAM, or a GPU, as a test says by its parameters; else the host."""
    name = getattr(request, "param", "host")
    with fake_gpu(monkeypatch) if name == "fake" else contextlib.nullcontext():
        yield CudaDevice() if name == "fake" else open_device(name)


@pytest.fixture
def coded(where: Device, tmp_path: Path) -> Coded:
    """Pages there for engines with a codec."""
    return Coded.make(tmp_path, device=where)
