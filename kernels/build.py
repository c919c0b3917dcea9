"""From kernel to cubin, with no GPU, cached on disk.

A cubin is machine code for one compute capability; any driver of the same CUDA major version loads it, while PTX from
a toolkit newer than the driver is refused. So PTX never leaves this file: nvJitLink assembles it here.

Cached (:mod:`kvortex.kernels.cache`) are the length of the entry's name (little-endian), the name, and the code. A file that
does not check is built anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import pathlib
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from kvortex.errors import BuildError
from kvortex.kernels import cache

KERNELS = {
    "gather": "kvortex.kernels.paged",
    "scatter": "kvortex.kernels.paged",
    "gather_resident": "kvortex.kernels.resident",
    "scatter_resident": "kvortex.kernels.resident",
    "gather_digest": "kvortex.kernels.paged",
    "scatter_digest": "kvortex.kernels.paged",
    "gather_resident_digest": "kvortex.kernels.resident",
    "scatter_resident_digest": "kvortex.kernels.resident",
    "read_pages": "kvortex.kernels.reading",
    "read_buffers": "kvortex.kernels.reading",
    "plane_encode": "kvortex.kernels.plane_encode",
    "plane_decode": "kvortex.kernels.plane_decode",
    "plane_decode_digest": "kvortex.kernels.plane_decode",
    "read_records": "kvortex.kernels.coded_read",
    "lossy_encode": "kvortex.kernels.lossy_encode",
    "lossy_decode": "kvortex.kernels.lossy_decode",
    "lossy_decode_digest": "kvortex.kernels.lossy_decode",
    "cachegen_count": "kvortex.kernels.cachegen_encode",
    "cachegen_encode": "kvortex.kernels.cachegen_encode",
    "cachegen_decode": "kvortex.kernels.cachegen_decode",
    "compute": "kvortex.kernels.compute",
}
# The most that a CTA of 512 threads can have (four of 128, of which a launch has two for a multiprocessor), that four of them
# can, that two, three and four of 256 can; eight of 128 have as many as four of 256.
_REGISTERS = {
    "kvortex.kernels.paged": 128,
    "kvortex.kernels.resident": 128,
    "kvortex.kernels.compute": 32,
    "kvortex.kernels.coded_read": 128,
    "kvortex.kernels.plane_encode": 64,
    "kvortex.kernels.plane_decode": 64,
    "kvortex.kernels.lossy_encode": 128,
    "kvortex.kernels.lossy_decode": 80,
    "kvortex.kernels.cachegen_encode": 64,
    "kvortex.kernels.cachegen_decode": 64,
}
# Before Hopper a vote in a loop is a call where the compiler does not see that warps are whole: registers for two CTAs of 256.
# And kernels that only read would take a few more than a CTA of 512 threads has.
_BEFORE_HOPPER = {
    f"kvortex.kernels.{codec}_{way}": 128 for codec in ("plane", "lossy", "cachegen") for way in ("encode", "decode")
} | {"kvortex.kernels.reading": 128}
# What Blackwell's code of a lossless coder has beyond 64 would be spilled: registers for three CTAs of 256.
_FROM_BLACKWELL = {f"kvortex.kernels.plane_{way}": 80 for way in ("encode", "decode")}
_MAGIC, _VERSION = b"KVXCUBIN", 2
_ENTRY_BYTES = struct.Struct("<I")
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
    stem = f"{name}-sm_{compute_capability[0]}{compute_capability[1]}"
    path = cache.cache_folder() / f"{stem}-{_fingerprint(compute_capability)[:24]}.cubin"
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

            from kvortex.kernels.ptx import text_for

            module = importlib.import_module(KERNELS[name])
            signature = module.DIGEST_SIGNATURE if name.endswith("_digest") else module.SIGNATURE
            ptx, _ = cuda.compile_ptx(getattr(module, name), signature, cc=compute_capability)
        ptx = text_for(ptx, compute_capability)
        entry = _ENTRY.search(ptx)
        if entry is None:
            raise BuildError(f"{name}: the compiler wrote no kernel")
        most = _REGISTERS.get(name, _REGISTERS.get(KERNELS[name]))
        if compute_capability < (9, 0):
            most = _BEFORE_HOPPER.get(KERNELS[name], most)
        elif compute_capability >= (10, 0):
            most = _FROM_BLACKWELL.get(KERNELS[name], most)
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
    body = cache.read(path, _MAGIC, _VERSION)
    if body is None:
        return None
    (n_entry,) = _ENTRY_BYTES.unpack_from(body)
    name = body[_ENTRY_BYTES.size :][:n_entry]
    return Cubin(body[_ENTRY_BYTES.size + n_entry :], name.decode())


def _write(path: pathlib.Path, cubin: Cubin) -> None:
    """A folder that cannot be written costs a compilation at each start, nothing else."""
    entry = cubin.entry.encode()
    cache.write(path, _MAGIC, _VERSION, _ENTRY_BYTES.pack(len(entry)) + entry + cubin.code)
