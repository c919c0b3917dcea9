"""Which CUDA stream an object stands for."""

from __future__ import annotations

import numbers
from typing import Any

from kvortex.errors import ArgumentError, cut, shown, told


def cuda_stream_handle(stream: Any) -> int:
    """The ``CUstream`` of a caller's stream, as an int.

    Parameters
    ----------
    stream
        None for the legacy default stream (which waits for all blocking streams), an int handle, or an object with
        ``__cuda_stream__`` (cuda.core, CuPy 14, JAX callers), ``cuda_stream`` (torch), ``ptr`` (CuPy) or ``handle``
        (Numba).

    Raises
    ------
    ArgumentError
        It is none of these, or raises whatever it likes, which is the error's cause then.
    """
    if type(stream) is int and 0 <= stream < 1 << 63:  # before anything else: a load's first copy waits for this
        return stream
    try:
        return _read(stream)
    except ArgumentError:
        raise
    except Exception as error:
        raise ArgumentError(f"{cut(type(stream).__name__)} cannot be read as a CUDA stream: {told(error)}") from error


def _read(stream: Any) -> int:
    if stream is None:
        return 0
    if isinstance(stream, bool):
        raise ArgumentError(f"{shown(stream)} is no stream")
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        pair = protocol() if callable(protocol) else protocol
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or pair[0] != 0:
            raise ArgumentError(f"__cuda_stream__ of {type(stream).__name__} gave {shown(pair)}; expected (0, handle)")
        return _handle(pair[1], stream)
    for name in ("cuda_stream", "ptr", "handle"):
        if hasattr(stream, name):
            return _handle(getattr(stream, name), stream)
    return _handle(stream, stream)


def _handle(value: Any, stream: Any) -> int:
    value = getattr(value, "value", value)  # ctypes.c_void_p, as Numba gives; its value is None for the default stream
    if value is None:
        return 0
    convert = getattr(value, "__index__", None)
    if convert is None and not isinstance(value, numbers.Number):  # a float is a number, and no handle
        convert = getattr(value, "__int__", None)
    try:
        handle = -1 if convert is None or isinstance(value, bool) else int(convert())
    except TypeError:  # an array
        handle = -1
    if not 0 <= handle < 1 << 63:
        raise ArgumentError(
            f"{type(stream).__name__} {shown(stream)} is no CUDA stream: pass an int handle or an object with __cuda_stream__"
        )
    return handle
