"""Devices by name."""

from __future__ import annotations

import pytest

import kvortex.devices.cuda
from kvortex import devices
from kvortex.devices import HostDevice, cuda_available, open_device
from kvortex.errors import ConfigError, DeviceUnavailableError
from tests.fake_driver import FakeDriver, installed


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ordinals of the GPUs that are opened, none of which exists."""
    ordinals: list[int] = []
    monkeypatch.setattr(kvortex.devices.cuda, "CudaDevice", lambda ordinal: ordinals.append(ordinal) or "a GPU")
    return ordinals


def test_host() -> None:
    assert isinstance(open_device("host"), HostDevice)


@pytest.mark.parametrize(("name", "ordinal"), [("cuda", 0), ("cuda:0", 0), ("cuda:7", 7), ("cuda:12", 12)])
def test_gpus(opened: list[int], name: str, ordinal: int) -> None:
    assert open_device(name) == "a GPU"
    assert opened == [ordinal]


@pytest.mark.parametrize(("there", "wanted"), [(True, [0]), (False, [])])
def test_auto(monkeypatch: pytest.MonkeyPatch, opened: list[int], there: bool, wanted: list[int]) -> None:
    monkeypatch.setattr(devices, "cuda_available", lambda: (there, ""))
    device = open_device()
    assert opened == wanted and (device == "a GPU" or isinstance(device, HostDevice))


BAD = ["", "gpu", "CUDA", "cuda:-1", "cuda:x", "cuda:1.0", "cuda: 1", "cuda:1:2", "cuda:", "cuda1", "host:0", "HOST", "auto:0",
       "cpu", "cuda:²", "cuda:٣", "cuda:+1", "cuda:00", "cuda:01", "cuda:" + "9" * 5000, "cuda:0\n", "x" * 10**6,
       None, 1, True, b"host", ["host"], HostDevice]  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=lambda name: str(name)[:20])
def test_bad_names(opened: list[int], name: str) -> None:
    with pytest.raises(ConfigError, match="is no device: say 'auto', 'host', 'cuda' or 'cuda:N'") as caught:
        open_device(name)
    assert not opened and len(str(caught.value)) < 250


def test_a_gpu_that_is_not_there() -> None:
    with installed(FakeDriver(cuDeviceGetCount=2)):
        with pytest.raises(DeviceUnavailableError, match=r"cuda:2 does not exist: the driver sees 2 GPU\(s\)"):
            open_device("cuda:2")
        assert open_device("cuda:1").name == "cuda:1"


def test_no_gpu_at_all() -> None:
    available, reason = cuda_available()
    if available:
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceUnavailableError) as caught:
        open_device("cuda")
    assert str(caught.value) == reason
    assert isinstance(open_device("auto"), HostDevice)
