"""Array libraries that measurements may use where they are installed. Nothing in kvortex imports them."""

from __future__ import annotations

import importlib
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


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # one that does not fit the machine fails in its own way
        raise DeviceUnavailableError(f"{name} cannot be imported: {told(error)}") from None
