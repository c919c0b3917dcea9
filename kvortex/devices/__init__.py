"""Devices: where KV pages live."""

from __future__ import annotations

import re

from kvortex.devices.base import Device, DeviceBuffer
from kvortex.devices.cuda import cuda_available
from kvortex.devices.host import HostDevice, HostStream
from kvortex.errors import ConfigError, shown

__all__ = ["Device", "DeviceBuffer", "HostDevice", "HostStream", "cuda_available", "open_device"]

_NAMES = "say 'auto', 'host', 'cuda' or 'cuda:N', such as 'cuda:0'"


def open_device(name: str = "auto") -> Device:
    """A device by name.

    Parameters
    ----------
    name
        ``"host"``, ``"cuda"`` (the first GPU), ``"cuda:N"``, or ``"auto"``: the first GPU if there is one, else the host.

    Raises
    ------
    ConfigError
        It is no such name.
    DeviceUnavailableError
        A GPU was named and is not there.
    """
    from kvortex.devices.cuda import CudaDevice

    if not isinstance(name, str):
        raise ConfigError(f"{type(name).__name__} {shown(name)} is no device: {_NAMES}")
    if name == "auto":
        name = "cuda" if cuda_available()[0] else "host"
    if name == "host":
        return HostDevice()
    match = re.fullmatch(r"cuda(?::(0|[1-9][0-9]{0,5}))?", name)
    if match is None:
        raise ConfigError(f"{shown(name)} is no device: {_NAMES}")
    return CudaDevice(int(match[1] or 0))
