"""Where the driver has ``cuMemcpyBatchAsync``, and in which form."""

from __future__ import annotations

from kvortex.devices import driver as cu
from kvortex.errors import DeviceUnavailableError

_OLD, _NEW = 12080, 13000  # versions of the driver's API that brought the function, and that took a parameter from it


def batch_function() -> tuple[int, bool]:
    """Address of the function, and whether it takes the address of a failed copy's index (CUDA 12.8).

    Raises
    ------
    DeviceUnavailableError
        The driver has none.
    """
    driver = cu.api()
    version = int(cu.check(driver.cuDriverGetVersion(), "cuDriverGetVersion"))
    if version < _OLD:
        seen = f"{version // 1000}.{version % 1000 // 10}"
        raise DeviceUnavailableError(f"cuMemcpyBatchAsync came with CUDA 12.8, and this driver has CUDA {seen}")
    form = _NEW if version >= _NEW else _OLD
    found = cu.check(driver.cuGetProcAddress(b"cuMemcpyBatchAsync", form, 0), "cuGetProcAddress(cuMemcpyBatchAsync)")
    address, status = int(found[0] or 0), found[1]
    if not address:
        raise DeviceUnavailableError(f"this driver has no cuMemcpyBatchAsync (status {status})")
    return address, form == _OLD
