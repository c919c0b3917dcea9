"""The CUDA driver through cuda-python: checked calls, and raw addresses of its functions for compiled code."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.errors import DeviceError, DeviceUnavailableError

# Functions that compiled code calls, with the driver version that fixed their signature.
_SYMBOLS = {
    "cuCtxPushCurrent": 4000,
    "cuCtxPopCurrent": 4000,
    "cuEventRecord": 2000,
    "cuStreamWaitEvent": 3020,
    "cuLaunchKernel": 4000,
    "cuMemcpyDtoHAsync": 3020,
    "cuMemcpyHtoDAsync": 3020,
    "cuMemcpy2DAsync": 3020,
    "cuStreamWaitValue32": 11070,
    "cuStreamWriteValue32": 11070,
    "cuCtxGetCurrent": 4000,
    "cuCtxSetCurrent": 4000,
    "cuThreadExchangeStreamCaptureMode": 10010,
    "cuEventQuery": 2000,
    "cuEventElapsedTime": 2000,
    "cuStreamQuery": 2000,
    "cuStreamIsCapturing": 10000,
}
# And one that a driver may lack: cuMemcpyBatchAsync, which came with CUDA 12.8 and has a parameter less since 13.0.
_BATCH_SINCE, _BATCH_CHANGED = 12080, 13000

# CUresult codes after which a context is unusable: its kernels crashed, its hardware failed, or it was destroyed. From the
# descriptions in cuda.h: "the process must be terminated and relaunched", and the codes for a context that is no more.
_FATAL = frozenset({4, 201, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911})
(
    CTX_PUSH,
    CTX_POP,
    EVENT_RECORD,
    STREAM_WAIT,
    LAUNCH,
    COPY_TO_HOST,
    COPY_TO_DEVICE,
    COPY_LINES,
    STREAM_WAIT_VALUE,
    STREAM_WRITE_VALUE,
    CTX_GET,
    CTX_SET,
    CAPTURE_MODE,
    EVENT_QUERY,
    EVENT_ELAPSED,
    STREAM_QUERY,
    STREAM_CAPTURING,
    COPY_BATCH,
    COPY_BATCH_12,
) = range(len(_SYMBOLS) + 2)


@functools.cache
def api() -> Any:
    """cuda-python's driver module, after ``cuInit``.

    Raises
    ------
    DeviceUnavailableError
        cuda-python or the driver is missing, or the machine has no GPU.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceUnavailableError(f"cuda-python cannot be imported: {error}") from error
    try:
        (code,) = driver.cuInit(0)
    except Exception as error:  # cuda.bindings raises RuntimeError, ImportError or its own where libcuda is missing
        raise DeviceUnavailableError(f"no CUDA driver on this machine: {error}") from error
    if int(code):
        raise DeviceUnavailableError(f"cuInit failed: {describe(driver, code)}")
    return driver


def describe(driver: Any, code: Any) -> str:
    """``"CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"``."""
    number = int(code)
    try:
        text = driver.cuGetErrorString(driver.CUresult(number))[1]
        return f"{driver.CUresult(number).name} ({number}): {text.decode() if text else ''}"
    except ValueError:  # a code newer than these bindings
        return f"CUDA error {number}"


def check(result: tuple[Any, ...], what: str) -> Any:
    """The values of a driver call, without the leading code; raises :class:`DeviceError` naming ``what``."""
    code, *values = result
    if int(code):
        error = DeviceError(f"{what}: {describe(api(), code)}")
        error.code = int(code)
        raise error
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def functions() -> npt.NDArray[np.int64]:
    """Addresses of the driver's functions, in the order of the constants above; read-only.

    Of ``COPY_BATCH`` and ``COPY_BATCH_12``, the forms of ``cuMemcpyBatchAsync`` from CUDA 13.0 on and before, at most one is
    not 0.
    """
    driver = api()
    table = np.zeros(len(_SYMBOLS) + 2, np.int64)
    for at, (name, version) in enumerate(_SYMBOLS.items()):
        address, status = check(driver.cuGetProcAddress(name.encode(), version, 0), f"cuGetProcAddress({name})")
        if not int(address):
            raise DeviceUnavailableError(f"the CUDA driver has no {name} (status {status})")
        table[at] = int(address)
    # A driver is asked for the form that its own version has. Asked for a later one, it could only give the earlier.
    version = driver_version()
    if version >= _BATCH_SINCE:
        new = version >= _BATCH_CHANGED
        code, address, *_ = driver.cuGetProcAddress(b"cuMemcpyBatchAsync", _BATCH_CHANGED if new else _BATCH_SINCE, 0)
        table[COPY_BATCH if new else COPY_BATCH_12] = 0 if int(code) else int(address or 0)
    table.flags.writeable = False
    return table


def driver_version() -> int:
    """The newest CUDA that the driver knows: 13000 for 13.0."""
    return int(check(api().cuDriverGetVersion(), "cuDriverGetVersion"))


def has_batched_copies() -> bool:
    """Whether the driver takes many copies in one call."""
    return bool(functions()[[COPY_BATCH, COPY_BATCH_12]].any())


def is_fatal(code: int) -> bool:
    """Whether an error means that the context is gone, so that nothing runs any more.

    Any other error of a query only means that the query failed: work may still be running.
    """
    return code in _FATAL


class current:  # noqa: N801
    """Makes a context current for the calling thread, gives the driver module, and puts the old one back.

    Other threads may be capturing a CUDA graph meanwhile. In the default mode our queries and allocations would then be
    refused, and would spoil their capture; none of ours can end up in it, so the mode is relaxed.

    A class and no generator, which takes twice as long. What a transfer asks more than once goes by
    :mod:`kvortex.devices.asking`.
    """

    __slots__ = ("_context", "_driver", "_mode")

    def __init__(self, context: Any) -> None:
        self._context = context

    def __enter__(self) -> Any:
        self._driver = driver = api()
        check(driver.cuCtxPushCurrent(self._context), "cuCtxPushCurrent")
        try:
            relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
            self._mode = check(driver.cuThreadExchangeStreamCaptureMode(relaxed), "cuThreadExchangeStreamCaptureMode")
        except BaseException:
            driver.cuCtxPopCurrent()
            raise
        return driver

    def __exit__(self, *_: object) -> None:
        try:
            self._driver.cuThreadExchangeStreamCaptureMode(self._mode)
        finally:
            self._driver.cuCtxPopCurrent()
