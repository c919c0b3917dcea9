"""From kernel to cubin, with no GPU, cached on disk.

A cubin is machine code for one compute capability; any driver of the same CUDA major version loads it, while PTX from
a toolkit newer than the driver is refused. So PTX never leaves this file: nvJitLink assembles it here.

Cache file: magic, version, length of the entry's name, length of the code (little-endian), SHA-256 of both, the name,
the code. A file that does not check is built anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import os
import pathlib
import re
import struct
import tempfile
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from kvortex.errors import BuildError

KERNELS = {
    "gather": "kvortex.kernels.paged",
    "scatter": "kvortex.kernels.paged",
    "gather_resident": "kvortex.kernels.resident",
    "scatter_resident": "kvortex.kernels.resident",
}
_REGISTERS = {"kvortex.kernels.resident": 128}  # most that a CTA of 512 threads can have
_MAGIC, _VERSION = b"KVXCUBIN", 1
_HEADER = struct.Struct("<8sIIQ32s")
_COMPILERS = (
    "numba-cuda",
    "numba",
    "cuda-core",
    "nvidia-nvvm",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-nvjitlink",
    "nvidia-nvjitlink-cu12",
)
_ENTRY = re.compile(r"\.visible \.entry (\w+)\(")
_lock = threading.Lock()


class Cubin(NamedTuple):
    """Machine code and the name of its kernel."""

    code: bytes
    entry: str


def cache_folder() -> pathlib.Path:
    """Where cubins are kept: ``$KVORTEX_CACHE_DIR``, else ``$XDG_CACHE_HOME/kvortex``, else ``~/.cache/kvortex``."""
    named = os.environ.get("KVORTEX_CACHE_DIR")
    if named:
        return pathlib.Path(named)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kvortex"


def load(name: str, compute_capability: tuple[int, int]) -> Cubin:
    """The cubin of a kernel: from the cache folder in milliseconds, else compiled (about a second) and cached.

    Parameters
    ----------
    name
        One of ``KERNELS``.
    compute_capability
        For example ``(9, 0)``.

    Raises
    ------
    BuildError
        The kernel does not compile here; the message names what is missing.
    """
    folder = cache_folder()
    stem = f"{name}-sm_{compute_capability[0]}{compute_capability[1]}"
    path = folder / f"{stem}-{_fingerprint(compute_capability)[:24]}.cubin"
    with _lock:
        cubin = _read(path)
        if cubin is None:
            cubin = compile_kernel(name, compute_capability)
            _write(path, cubin)
    return cubin


def compile_kernel(name: str, compute_capability: tuple[int, int]) -> Cubin:
    """Compiles a kernel with numba-cuda and nvJitLink. Needs neither a GPU nor a driver. See :func:`load`."""
    try:
        with _row_stack(), warnings.catch_warnings():
            # numba-cuda 0.30 meets deprecations of NumPy 2.5; a caller who makes errors of warnings can compile all the same
            warnings.simplefilter("ignore", DeprecationWarning)
            from cuda.core import Linker, LinkerOptions, ObjectCode
            from numba import cuda

            module = importlib.import_module(KERNELS[name])
            ptx, _ = cuda.compile_ptx(getattr(module, name), module.SIGNATURE, cc=compute_capability)
        entry = _ENTRY.search(ptx)
        if entry is None:
            raise BuildError(f"{name}: the compiler wrote no kernel")
        most = _REGISTERS.get(KERNELS[name])
        options = LinkerOptions(arch="sm_{}{}".format(*compute_capability), max_register_count=most)
        linked: Any = Linker(ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin")
        return Cubin(bytes(linked.code), entry[1])
    except BuildError:
        raise
    except Exception as error:
        # Whatever the tool chain raises (a missing NVVM or nvJitLink, a capability it does not know) means the same.
        raise BuildError(
            f"kernel {name!r} does not compile for compute capability {compute_capability}: {type(error).__name__}: {error}. "
            "The compiler's libraries come with pip install -e \".[cu13]\" (or [cu12]) in the kvortex checkout."
        ) from error


@contextlib.contextmanager
def _row_stack() -> Iterator[None]:
    """Lends numpy the ``row_stack`` that 2.5 dropped while numba-cuda 0.30 registers its functions, then takes it back."""
    if hasattr(np, "row_stack"):
        yield
        return
    np.row_stack = np.vstack  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del np.row_stack  # type: ignore[attr-defined]


@functools.cache
def _fingerprint(compute_capability: tuple[int, int]) -> str:
    """Names source, compiler and target; a change of any of them is another cache file."""
    digest = hashlib.sha256(repr((_VERSION, compute_capability)).encode())
    for source in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + hashlib.sha256(source.read_bytes()).digest())
    for package in _COMPILERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{package}={importlib.metadata.version(package)};".encode())
    return digest.hexdigest()


def _read(path: pathlib.Path) -> Cubin | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _HEADER.size:
        return None
    magic, version, n_entry, n_code, digest = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    if (magic, version) != (_MAGIC, _VERSION) or len(body) != n_entry + n_code or hashlib.sha256(body).digest() != digest:
        return None
    return Cubin(body[n_entry:], body[:n_entry].decode())


def _write(path: pathlib.Path, cubin: Cubin) -> None:
    """Whole or not at all; a folder that cannot be written costs a compilation at each start, nothing else."""
    body = cubin.entry.encode() + cubin.code
    head = _HEADER.pack(_MAGIC, _VERSION, len(cubin.entry.encode()), len(cubin.code), hashlib.sha256(body).digest())
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".cubin-", delete=False) as file:
            temporary = file.name
            file.write(head + body)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
