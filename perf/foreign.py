"""Array libraries that measurements may use where they are installed. Nothing in kvortex imports them."""

from __future__ import annotations

import importlib
import os
from typing import Any

from kvortex.errors import DeviceUnavailableError, told


def torch() -> Any:
    """torch, or a DeviceUnavailableError that says what is missing."""
    module = _module("torch")
    if not module.cuda.is_available():
        raise DeviceUnavailableError("torch sees no GPU")
    return module


def cupy() -> Any:
    """CuPy, or a DeviceUnavailableError that says what is missing."""
    module = _module("cupy")
    if not module.cuda.is_available():
        raise DeviceUnavailableError("CuPy sees no GPU")
    return module


def jax(device: str) -> Any:
    """JAX on a device of kvortex's name, or a DeviceUnavailableError that says what is missing.

    To be called before anybody else imports JAX: on the host no GPU is touched then. On a GPU it takes three quarters of the
    memory at once, as it does by default, and what is allocated first lies side by side.
    """
    platform, _, ordinal = device.partition(":")
    if platform == "host":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    module = _module("jax")
    try:
        found = module.devices("cpu" if platform == "host" else "gpu")[int(ordinal or 0)]
    except (RuntimeError, IndexError) as error:
        raise DeviceUnavailableError(f"JAX sees no {device}: {told(error)}") from None
    module.config.update("jax_default_device", found)
    return module


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # one that does not fit the machine fails in its own way
        raise DeviceUnavailableError(f"{name} cannot be imported: {told(error)}") from None
