"""A CUDA GPU, through cuda-python. Uses the primary context, the one that CuPy, JAX, Numba and torch use too."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.arguments import integer
from kvortex.devices.base import Bytes, Device, DeviceBuffer
from kvortex.devices.driver import api, check, current
from kvortex.errors import DeviceError, DeviceUnavailableError


def cuda_available() -> tuple[bool, str]:
    """Whether a GPU can be used here, and if not, why."""
    try:
        count = check(api().cuDeviceGetCount(), "cuDeviceGetCount")
    except DeviceError as error:
        return False, str(error)
    return (True, "") if count else (False, "the CUDA driver sees no GPU")


class CudaBuffer(DeviceBuffer):
    """VRAM from ``cuMemAlloc``, with ``__cuda_array_interface__`` (uint8)."""

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        self._device = device
        self.nbytes = nbytes
        self.address = 0
        with current(device.context) as driver:
            self.address = int(check(driver.cuMemAlloc(nbytes), f"cuMemAlloc({nbytes})"))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "strides": None, "version": 3}

    @property
    def device(self) -> int:
        """Ordinal of the GPU, as array libraries name it."""
        return self._device.ordinal

    def write(self, data: npt.NDArray[Any], offset: int = 0) -> None:
        flat = self._bytes_of(data)
        first, nbytes = self._inside(offset, flat.size)
        with current(self._device.context) as driver:
            check(driver.cuMemcpyHtoD(self.address + first, flat.ctypes.data, nbytes), "cuMemcpyHtoD")
            check(driver.cuCtxSynchronize(), "cuCtxSynchronize")

    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        first, count = self._inside(offset, nbytes)
        data = np.empty(count, np.uint8)
        with current(self._device.context) as driver:
            check(driver.cuCtxSynchronize(), "cuCtxSynchronize")
            check(driver.cuMemcpyDtoH(data.ctypes.data, self.address + first, count), "cuMemcpyDtoH")
        return data

    def free(self) -> None:
        address, self.address, self.nbytes = self.address, 0, 0
        if address:
            with current(self._device.context) as driver:
                check(driver.cuMemFree(address), "cuMemFree")

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit the driver may be gone, and the memory with it
            self.free()


class CudaDevice(Device):
    """One GPU.

    Parameters
    ----------
    ordinal
        Index among the GPUs that the driver shows.

    Raises
    ------
    DeviceUnavailableError
        No driver, or no such GPU.
    """

    def __init__(self, ordinal: int = 0) -> None:
        driver = api()
        count = check(driver.cuDeviceGetCount(), "cuDeviceGetCount")
        if ordinal >= count:
            raise DeviceUnavailableError(f"cuda:{ordinal} does not exist: the driver sees {count} GPU(s)")
        self.ordinal = ordinal
        self.name = f"cuda:{ordinal}"
        self._handle = check(driver.cuDeviceGet(ordinal), "cuDeviceGet")
        # Retained for the life of the process: releasing the last reference would reset the context under others.
        self.context = check(driver.cuDevicePrimaryCtxRetain(self._handle), "cuDevicePrimaryCtxRetain")
        attribute = driver.CUdevice_attribute
        self.compute_capability = (
            self.attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self.attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )
        self.max_pitch = self.attribute(attribute.CU_DEVICE_ATTRIBUTE_MAX_PITCH)
        self.has_stream_flags = bool(self.attribute(attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS))
        self.multiprocessors = self.attribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)

    def attribute(self, name: Any) -> int:
        """A ``CUdevice_attribute``."""
        return int(check(api().cuDeviceGetAttribute(name, self._handle), f"cuDeviceGetAttribute({name})"))

    def allocate(self, nbytes: int) -> CudaBuffer:
        return CudaBuffer(self, integer(nbytes, "nbytes", 1))

    def pin(self, address: int, nbytes: int) -> None:
        with current(self.context) as driver:
            flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
            check(driver.cuMemHostRegister(address, nbytes, flags), f"cuMemHostRegister of {nbytes} bytes")

    def unpin(self, address: int) -> None:
        with current(self.context) as driver:
            check(driver.cuMemHostUnregister(address), "cuMemHostUnregister")

    def allocate_pinned(self, nbytes: int) -> int:
        with current(self.context) as driver:
            flags = driver.CU_MEMHOSTALLOC_PORTABLE | driver.CU_MEMHOSTALLOC_DEVICEMAP
            return int(check(driver.cuMemHostAlloc(nbytes, flags), f"cuMemHostAlloc of {nbytes} bytes"))

    def free_pinned(self, address: int) -> None:
        with current(self.context) as driver:
            check(driver.cuMemFreeHost(address), "cuMemFreeHost")

    def owner_of(self, address: int) -> str | None:
        driver = api()
        kinds = driver.CUpointer_attribute
        code, kind = driver.cuPointerGetAttribute(kinds.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
        if int(code):
            return None
        if int(kind) == int(driver.CUmemorytype.CU_MEMORYTYPE_HOST):
            return "host"
        code, ordinal = driver.cuPointerGetAttribute(kinds.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
        return None if int(code) else f"cuda:{int(ordinal)}"

    def allocation(self, address: int) -> tuple[int, int] | None:
        """First address and bytes of the piece of VRAM that an address lies in; None where the driver does not say."""
        with current(self.context) as driver:
            code, base, nbytes = driver.cuMemGetAddressRange(address)
        return None if int(code) else (int(base), int(nbytes))

    def numa_node(self) -> int | None:
        try:
            node = int((_pci_folder(self.pci_bus_id) / "numa_node").read_text())
        except (OSError, ValueError):
            return None
        return node if node >= 0 else None

    @property
    def link_rate(self) -> float | None:
        """Bytes per second that the link carries one way, packets and all; None where the system does not say.

        What both ends can do, and every bridge on the way: an idle link may be slower just then.
        """
        folder = _pci_folder(self.pci_bus_id)
        own = _most_of_link(folder)
        return own and min(filter(None, (own, *map(_most_of_link, folder.resolve().parents))))

    @property
    def pci_bus_id(self) -> str:
        """``"0000:0a:00.0"``."""
        text: bytes = check(api().cuDeviceGetPCIBusId(32, self._handle), "cuDeviceGetPCIBusId")
        return text.split(b"\0")[0].decode().lower()

    @property
    def memory_bytes(self) -> int:
        """Of the whole GPU."""
        return int(check(api().cuDeviceTotalMem(self._handle), "cuDeviceTotalMem"))

    @property
    def free_bytes(self) -> int:
        """Of the GPU's memory, what nobody has at the moment."""
        with current(self.context) as driver:
            return int(check(driver.cuMemGetInfo(), "cuMemGetInfo")[0])

    def describe(self) -> dict[str, Any]:
        driver = api()
        name: bytes = check(driver.cuDeviceGetName(128, self._handle), "cuDeviceGetName")
        folder = _pci_folder(self.pci_bus_id)
        return {
            "device": self.name,
            "gpu": name.split(b"\0")[0].decode(),
            "compute_capability": ".".join(map(str, self.compute_capability)),
            "multiprocessors": self.multiprocessors,
            "memory_bytes": self.memory_bytes,
            "driver": _driver_version(),
            "cuda_driver_api": int(check(driver.cuDriverGetVersion(), "cuDriverGetVersion")),
            "pci_bus_id": self.pci_bus_id,
            "pcie_link": {key: _text(folder / f"current_link_{key}") for key in ("speed", "width")},
            "numa_node": self.numa_node(),
        }


def _pci_folder(bus_id: str) -> pathlib.Path:
    return pathlib.Path("/sys/bus/pci/devices") / bus_id


def _most_of_link(folder: pathlib.Path) -> float | None:
    """Bytes per second that one end of a link can do."""
    speed, width = _text(folder / "max_link_speed"), _text(folder / "max_link_width")
    try:
        transfers, lanes = float((speed or "").split(" ")[0]), int(width or "")  # "32.0 GT/s PCIe"
    except ValueError:
        return None
    coding = 128 / 130 if transfers >= 8 else 8 / 10
    return transfers * 1e9 * lanes * coding / 8 or None


def _text(path: pathlib.Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _driver_version() -> str | None:
    """The kernel driver's version, such as ``580.159.04``."""
    text = _text(pathlib.Path("/sys/module/nvidia/version"))
    if text is None and (lines := _text(pathlib.Path("/proc/driver/nvidia/version"))):
        text = next((word for word in lines.split() if word[:1].isdigit() and "." in word), None)
    return text
