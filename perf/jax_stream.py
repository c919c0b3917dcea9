"""The CUDA stream that JAX computes on, asked of XLA by a call from inside of a computation.

JAX shows nobody its streams, but XLA tells a foreign function on which one it runs (its FFI, a stable C interface), and puts
all that a device computes on that one, in the order of calls. So a wait that is put there before a computation is launched
is before it there too, however late XLA gets to launching.
"""

from __future__ import annotations

import ctypes
from typing import Any

from kvortex.errors import DeviceError

_EXECUTE, _METADATA = 3, 1  # a stage, and a kind of extension
_NAME = "kvortex_perf_stream"


class _Version(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("major", ctypes.c_int), ("minor", ctypes.c_int)]


class _Api(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("version", _Version)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("internal", "error_create", "error_message", "error_destroy")]
    _fields_ += [("register", ctypes.c_void_p), ("stream_get", ctypes.c_void_p)]


class _Metadata(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32)]


class _Extension(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("kind", ctypes.c_int), ("next", ctypes.c_void_p)]
    _fields_ += [("metadata", ctypes.POINTER(_Metadata))]


class _Frame(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.POINTER(_Extension)), ("api", ctypes.POINTER(_Api))]
    _fields_ += [("context", ctypes.c_void_p), ("stage", ctypes.c_int)]


class _Asked(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("context", ctypes.c_void_p)]
    _fields_ += [("stream", ctypes.c_void_p)]


_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))
_GETTER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Asked))
_DESTROYER = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_void_p * 3))
_seen: list[int | None] = []  # of each call, None where there is no stream


@_HANDLER
def _handler(frame: Any) -> int | None:
    frame = frame.contents
    api = frame.api.contents
    if frame.extension and frame.extension.contents.kind == _METADATA:  # asked before anything runs
        found = frame.extension.contents.metadata.contents
        found.version.major, found.version.minor, found.traits = api.version.major, api.version.minor, 0
        return None
    if frame.stage == _EXECUTE:
        asked = _Asked(ctypes.sizeof(_Asked), None, frame.context, None)
        error = _GETTER(api.stream_get)(ctypes.byref(asked))
        if error:
            _DESTROYER(api.error_destroy)(ctypes.byref((ctypes.c_void_p * 3)(3 * ctypes.sizeof(ctypes.c_void_p), None, error)))
        _seen.append(None if error else asked.stream)
    return None


def stream_of(jax: Any, platform: str = "CUDA") -> int:
    """Handle of the stream that JAX computes on.

    Parameters
    ----------
    jax
        The module.
    platform
        As XLA names it.

    Raises
    ------
    DeviceError
        This JAX does not tell, or there is no stream: on a CPU, nothing has one.
    """
    try:
        jax.ffi.register_ffi_target(_NAME, jax.ffi.pycapsule(_handler), platform=platform)
        call = jax.ffi.ffi_call(_NAME, jax.ShapeDtypeStruct((), "int32"), has_side_effect=True)
        for _ in range(2):
            jax.block_until_ready(jax.jit(call)())
    except Exception as error:  # of a JAX that does this otherwise
        raise DeviceError(f"JAX {jax.__version__} did not tell its stream: {error}") from None
    seen, _seen[:] = tuple(_seen), ()
    if len(set(seen)) != 1 or not seen[0]:
        raise DeviceError(f"JAX {jax.__version__} on {platform} has not one stream to compute on; seen: {seen}")
    return seen[0]
