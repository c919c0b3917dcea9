"""Versions of what takes part, for reports."""

from __future__ import annotations

import importlib.metadata
import platform

from kvortex import __version__

REQUIRED = ("numpy", "numba", "numba-cuda", "cuda-bindings", "cuda-core")
_OTHERS = (  # the compilers come as wheels of either toolkit
    "llvmlite",
    "cuda-pathfinder",
    "cuda-toolkit",
    "nvidia-nvvm",
    "nvidia-nvjitlink",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-nvjitlink-cu12",
    "nvidia-cuda-nvrtc-cu12",
    "rich",
)


def versions() -> dict[str, str]:
    """Name to version, of Python, kvortex and the packages that are installed."""
    found = {"python": platform.python_version(), "kvortex": __version__}
    for name in (*REQUIRED, *_OTHERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
