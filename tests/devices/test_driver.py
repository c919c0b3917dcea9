"""The CUDA driver's errors in words, its functions' addresses, and a machine that has none."""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace

import cuda.bindings
import numpy as np
import pytest

from kvortex.devices import cuda_available
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError, DeviceUnavailableError
from tests.fake_driver import FakeDriver, installed


def no_library(_: int) -> None:
    raise RuntimeError("libcuda.so.1 cannot be opened")


def test_no_driver_on_the_machine() -> None:
    with installed(SimpleNamespace(cuInit=no_library)):
        with pytest.raises(DeviceUnavailableError, match="^no CUDA driver on this machine: libcuda.so.1 cannot be opened$"):
            cu.api()
        assert cuda_available() == (False, "no CUDA driver on this machine: libcuda.so.1 cannot be opened")


def test_no_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(FakeDriver()):
        with monkeypatch.context() as patch:
            patch.delattr(cuda.bindings, "driver")
            patch.setitem(sys.modules, "cuda.bindings.driver", None)
            with pytest.raises(DeviceUnavailableError, match="^cuda-python cannot be imported: "):
                cu.api()
        assert isinstance(cu.api(), FakeDriver), "a failure is not remembered"


def test_a_driver_that_refuses_to_start() -> None:
    driver = FakeDriver()
    driver.fails["cuInit"] = (100, 0)
    wanted = "cuInit failed: CUDA_ERROR_NO_DEVICE (100): no CUDA-capable device is detected"
    with installed(driver):
        with pytest.raises(DeviceUnavailableError) as caught:
            cu.api()
        assert str(caught.value) == wanted and cuda_available() == (False, wanted)


def test_a_driver_without_a_gpu_and_with_one() -> None:
    with installed(FakeDriver(cuDeviceGetCount=0)):
        assert cuda_available() == (False, "the CUDA driver sees no GPU")
    with installed(FakeDriver(cuDeviceGetCount=2)) as driver:
        assert cuda_available() == (True, "")
        assert cuda_available() == (True, "") and len(driver.named("cuInit")) == 1


def test_describe() -> None:
    driver = FakeDriver()
    assert cu.describe(driver, 2) == "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"
    assert cu.describe(driver, 1) == "CUDA_ERROR_INVALID_VALUE (1): "
    assert cu.describe(driver, 4321) == "CUDA error 4321"


@pytest.mark.gpu
def test_describe_with_the_real_driver() -> None:
    assert cu.describe(cu.api(), 2) == "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"
    assert cu.describe(cu.api(), 999_999) == "CUDA error 999999"


def test_check_gives_the_values_without_the_code() -> None:
    with installed(FakeDriver()):
        assert cu.check((0,), "cuNothing") == ()
        assert cu.check((0, 5), "cuOne") == 5
        assert cu.check((0, 5, 6), "cuTwo") == (5, 6)
        with pytest.raises(DeviceError, match=r"^cuMemAlloc\(9\): CUDA_ERROR_OUT_OF_MEMORY \(2\): out of memory$"):
            cu.check((2, None), "cuMemAlloc(9)")
        with pytest.raises(DeviceError, match="^cuNew: CUDA error 4321$"):
            cu.check((4321,), "cuNew")


def test_a_context_is_current_inside_and_put_back_on_every_path() -> None:
    with installed(FakeDriver()) as driver:
        with cu.current(77) as given:
            assert given is driver and driver.named("cuCtxPushCurrent") == [(77,)]
            relaxed = "CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED"
            assert driver.calls[-1] == ("cuThreadExchangeStreamCaptureMode", (relaxed,))
        assert driver.calls[-2] == ("cuThreadExchangeStreamCaptureMode", (0x1000,)), "the mode that was there before"
        assert driver.calls[-1][0] == "cuCtxPopCurrent"
        with pytest.raises(ZeroDivisionError), cu.current(78):
            raise ZeroDivisionError
        assert [name for name, _ in driver.calls] == [
            "cuInit",
            *["cuCtxPushCurrent", *["cuThreadExchangeStreamCaptureMode"] * 2, "cuCtxPopCurrent"] * 2,
        ]


def test_a_context_that_cannot_be_made_current_is_not_popped() -> None:
    with installed(FakeDriver()) as driver:
        driver.fails["cuCtxPushCurrent"] = (1, 0)
        with pytest.raises(DeviceError, match="cuCtxPushCurrent: CUDA_ERROR_INVALID_VALUE"), cu.current(77):
            pytest.fail("the body must not run")
        assert not driver.named("cuCtxPopCurrent")


def address_of(name: bytes, version: int, flags: int) -> tuple[int, int, int]:
    return 0, 0x1000 + len(name) + version * 0x10000, 0


def test_the_functions_table() -> None:
    with installed(FakeDriver(cuGetProcAddress=address_of, cuDriverGetVersion=12070)) as driver:
        table = cu.functions()
        names = [name for name, _, _ in driver.named("cuGetProcAddress")]
        assert names[cu.CTX_PUSH] == b"cuCtxPushCurrent" and names[cu.CTX_POP] == b"cuCtxPopCurrent"
        assert names[cu.EVENT_RECORD] == b"cuEventRecord" and names[cu.STREAM_WAIT] == b"cuStreamWaitEvent"
        assert names[cu.LAUNCH] == b"cuLaunchKernel"
        assert names[cu.COPY_TO_HOST] == b"cuMemcpyDtoHAsync" and names[cu.COPY_TO_DEVICE] == b"cuMemcpyHtoDAsync"
        found = [address_of(*arguments)[1] for arguments in driver.named("cuGetProcAddress")]
        assert table.tolist() == [*found, 0, 0], "a driver older than CUDA 12.8 is not asked for a batch of copies"
        assert not table.flags.writeable and cu.functions() is table


def test_a_function_that_the_driver_lacks() -> None:
    lacks = FakeDriver(cuGetProcAddress=lambda name, *_: (0, 0, 1) if name == b"cuLaunchKernel" else (0, 5, 0))
    with installed(lacks), pytest.raises(DeviceUnavailableError, match=r"the CUDA driver has no cuLaunchKernel \(status 1\)"):
        cu.functions()


@pytest.mark.parametrize("version", [12080, 12090, 13000, 13010])
def test_a_batch_of_copies_is_asked_for_in_the_form_that_the_driver_has(version: int) -> None:
    """Asked for a later one, it would give its own, which takes other arguments."""
    form = 13000 if version >= 13000 else 12080
    with installed(FakeDriver(cuGetProcAddress=address_of, cuDriverGetVersion=version)) as driver:
        table = cu.functions()
        assert driver.named("cuGetProcAddress")[-1] == (b"cuMemcpyBatchAsync", form, 0)
        at, other = (cu.COPY_BATCH, cu.COPY_BATCH_12) if form == 13000 else (cu.COPY_BATCH_12, cu.COPY_BATCH)
        assert table[at] == address_of(b"cuMemcpyBatchAsync", form, 0)[1] and table[other] == 0


@pytest.mark.parametrize("answer", [(0, 0, 1), (0, None, 1), (500, None, None), (801, 0, 1)])
def test_a_driver_may_lack_a_batch_of_copies(answer: tuple[int, ...]) -> None:
    def find(name: bytes, version: int, flags: int) -> tuple[int, ...]:
        return answer if b"Batch" in name else address_of(name, version, flags)

    with installed(FakeDriver(cuGetProcAddress=find, cuDriverGetVersion=13000)):
        assert cu.functions()[[cu.COPY_BATCH, cu.COPY_BATCH_12]].tolist() == [0, 0]


@pytest.mark.gpu
def test_the_real_functions() -> None:
    table = cu.functions()
    optional = table[[cu.COPY_BATCH, cu.COPY_BATCH_12]]
    always = np.delete(table, [cu.COPY_BATCH, cu.COPY_BATCH_12])
    assert (always > 0).all() and len(set(always.tolist())) == len(always)
    version = cu.driver_version()
    assert (optional > 0).tolist() == [version >= 13000, 12080 <= version < 13000]


def test_a_buffer_that_outlives_a_fake_driver_asks_no_driver() -> None:
    """Its collection would otherwise hand an invented context to the driver of a real GPU."""
    with installed(FakeDriver()):
        outlives = CudaDevice(0).allocate(64)
        assert outlives.address
    other = FakeDriver()
    with installed(other):
        del outlives
        gc.collect()
    assert not other.calls
