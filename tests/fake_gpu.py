"""A GPU made of RAM: the driver of :mod:`tests.fake_driver` with memory behind it, and kernels that are loops.

Work is done while it is issued, which is one of the orders that streams and events allow. So this shows that the right
bytes are asked for, and what becomes of errors; what waits for what, only a real GPU, :mod:`tests.late_gpu` or
:mod:`tests.transfer.recorder` can show.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvortex.devices import driver as cu
from kvortex.devices.host import HostBuffer
from kvortex.digests.host import numbers, sum_part
from kvortex.digests.keys import kernel_numbers
from kvortex.kernels import build
from tests import fake_codecs
from tests.fake_driver import FakeDriver, Result, installed
from tests.transfer.recorder import Call, Recorder

_SYMBOLS = ("cuCtxPushCurrent", "cuCtxPopCurrent", "cuEventRecord", "cuStreamWaitEvent", "cuLaunchKernel",
            "cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync", "cuMemcpy2DAsync", "cuStreamWaitValue32",
            "cuStreamWriteValue32", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuThreadExchangeStreamCaptureMode", "cuEventQuery",
            "cuEventElapsedTime", "cuStreamQuery", "cuStreamIsCapturing")  # fmt: skip
_NOT_CAPTURING = "CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE"
_ENTRIES = {b"gather": 0x6A, b"scatter": 0x5C, b"gather_resident": 0x6B, b"scatter_resident": 0x5D, b"compute": 0xC0,
            b"gather_digest": 0x16A, b"scatter_digest": 0x15C, b"gather_resident_digest": 0x16B,
            b"scatter_resident_digest": 0x15D, b"read_pages": 0xD1, b"read_buffers": 0xD2, **fake_codecs.ENTRIES}  # fmt: skip
_TABLE, _NUMBERS = kernel_numbers(8 << 20), numbers(8 << 20)  # made here: tests interrupt every line of kvortex
_DIGESTS = 0x100  # in the entry of a kernel that moves bytes: it digests them
_CODES = set(fake_codecs.ENTRIES.values())
_RESIDENT = {_ENTRIES[name] for name in _ENTRIES if b"resident" in name}


class FakeGpu(FakeDriver):
    """
    Attributes
    ----------
    issued : Recorder
        What compiled code called; ``issued.fails`` maps positions to error codes.
    event_code
        What every event answers.
    capturing : dict
        Stream to capture status.
    memory : dict
        Address to buffer of all memory that was taken and not given back.
    registered : dict
        Address to bytes of host memory that may be reached.
    wild : list of str
        Accesses outside of all this; they are not made.
    lazy : bool
        Whether it goes on only while somebody asks how far it is.
    """

    lazy = False

    def __init__(self) -> None:
        take, give = self._take, self._give
        super().__init__(
            cuDeviceGetCount=1,
            cuDeviceGetAttribute=lambda name, _: (Result(0), self.max_pitch if "PITCH" in str(name) else 8),
            cuCtxGetStreamPriorityRange=lambda: (Result(0), 0, -5),
            cuMemAlloc=take,
            cuMemAllocFromPoolAsync=take,
            cuMemHostAlloc=take,
            cuMemHostRegister=self._register,
            cuMemHostUnregister=self._unregister,
            cuMemGetAddressRange=self._range,
            cuMemFree=give,
            cuMemFreeAsync=give,
            cuMemFreeHost=give,
            cuMemcpyHtoD=self._move,
            cuMemcpyDtoH=self._move,
            cuMemsetD8Async=lambda address, byte, n, _: (Result(0 * ctypes.memset(address, byte, n)),),
            cuMemsetD8=lambda address, byte, n: (Result(0 * ctypes.memset(address, byte, n)),),
            cuEventQuery=lambda _: (Result(self.event_code),),
            cuEventElapsedTime=0.5,
            cuStreamIsCapturing=lambda stream: (Result(0), self.capturing.get(stream, _NOT_CAPTURING)),
            cuPointerGetAttribute=lambda *_: (Result(1), None),
            cuModuleGetFunction=lambda _, name: (Result(0), _ENTRIES[name]),
            cuGetProcAddress=self._find,
            cuDriverGetVersion=13000,
            cuDeviceGetPCIBusId=b"ffff:ff:1f.7\0",  # which no machine has
            cuDeviceGetName=b"A GPU made of RAM\0",
            cuDeviceTotalMem=8 << 30,
            cuMemGetInfo=lambda: (Result(0), 7 << 30, 8 << 30),
        )
        self.issued = Recorder(also=self._execute, answer=self._asked)
        self.max_pitch = 2**31 - 1
        self.event_code = 0
        self.capturing: dict[int, str] = {}
        self.resident: list[Iterator[str]] = []
        self.counters: dict[int, int] = {}  # of shares, and on which stream they are
        self.memory: dict[int, HostBuffer] = {}
        self.registered: dict[int, int] = {}
        self.wild: list[str] = []

    def _register(self, address: int, nbytes: int, _: int) -> tuple[Result]:
        self.registered[address] = nbytes
        return (Result(0),)

    def _unregister(self, address: int) -> tuple[Result]:
        del self.registered[address]
        return (Result(0),)

    def _find(self, name: bytes, version: int, _: int) -> tuple[Result, int, int]:
        """As a driver of the version that ``answers`` tells: of two forms of a function the one that was right in ``version``,
        and none that is newer than itself."""
        which = _SYMBOLS.index(name.decode()) if name.decode() in _SYMBOLS else cu.COPY_BATCH
        if which == cu.COPY_BATCH:
            version = min(version, self.answers["cuDriverGetVersion"])
            if version < 12080:
                return Result(0), 0, 1
            which = cu.COPY_BATCH if version >= 13000 else cu.COPY_BATCH_12
        return Result(0), int(self.issued.functions[which]), 0

    def _asked(self, which: int, a: int, b: int, c: int) -> int:
        """A question of compiled code, as if cuda-python had asked it."""
        name = _SYMBOLS[which]
        if name == "cuEventElapsedTime":
            code, milliseconds = self.cuEventElapsedTime(b, c)
            ctypes.c_float.from_address(a).value = milliseconds or 0.0
        elif name == "cuStreamIsCapturing":
            code, status = self.cuStreamIsCapturing(a)
            ctypes.c_int.from_address(b).value = status != _NOT_CAPTURING
        else:
            code, *_ = getattr(self, name)(a)
            if name == "cuCtxGetCurrent":
                ctypes.c_int64.from_address(a).value = 0
        return int(code)

    def _reach(self, what: str, address: int, nbytes: int) -> bool:
        """Whether a range lies in one piece of memory of this GPU."""
        if nbytes >= 0:
            for at, buffer in list(self.memory.items()):
                if at <= address and address + nbytes <= at + buffer.nbytes:
                    return True
            for at, size in list(self.registered.items()):
                if at <= address and address + nbytes <= at + size:
                    return True
        self.wild.append(f"{what} reaches [{address:#x}, {address + nbytes:#x})")
        return False

    def _rectangle(self, cell: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Source, bytes to its next line, target, and bytes to that's."""
        (source, from_pitch), (target, to_pitch) = ((cell[at + 3] + cell[at + 4], cell[at + 6]) for at in (0, 7))
        assert sorted((cell[2], cell[9])) == [1, 2], "one side is the host, the other the device"
        device, pitch = (source, from_pitch) if cell[2] == 2 else (target, to_pitch)
        self._reach("a rectangle", device, (cell[15] - 1) * pitch + cell[14])
        if max(from_pitch, to_pitch) > self.max_pitch:
            self.wild.append(f"a rectangle of lines {from_pitch} and {to_pitch} bytes apart")
        return source, from_pitch, target, to_pitch

    def _copy(self, what: str, target: int, source: int, nbytes: int) -> None:
        if self._reach(what, target, nbytes) and self._reach(what, source, nbytes):
            ctypes.memmove(target, source, nbytes)

    def _take(self, nbytes: int, *_: Any) -> tuple[Result, int]:
        buffer = HostBuffer(nbytes)
        buffer.array[:] = 0xEE
        self.memory[buffer.address] = buffer
        return Result(0), buffer.address

    def _range(self, address: int) -> tuple[Result, int, int]:
        for base, buffer in list(self.memory.items()):
            if base <= address < base + buffer.nbytes:
                return Result(0), base, buffer.nbytes
        return Result(1), 0, 0

    def _give(self, address: int, *_: Any) -> tuple[Result]:
        gone = self.memory.pop(address)
        self.counters = {at: on for at, on in self.counters.items() if not 0 <= at - address < gone.nbytes}
        return (Result(0),)

    def _move(self, target: int, source: int, nbytes: int) -> tuple[Result]:
        ctypes.memmove(target, source, nbytes)
        return (Result(0),)

    def _flag(self, name: str, address: int, value: int) -> None:
        if not self._reach("a flag", address, 4):
            return
        assert address not in self.counters, "a flag where launches share work"
        cell = ctypes.c_uint32.from_address(address)
        if name == "write_value":
            cell.value = value
            self._pump()
        elif is_behind(address, value):
            self.wild.append(f"a stream waits for ever: flag {cell.value}, wanted {value}")

    def _pump(self) -> None:
        """Lets resident kernels go on as far as flags allow, in the order of their launches."""
        while self.resident and (state := next(self.resident[0], "end")) != "waiting":
            if state == "end":
                self.resident.pop(0)

    def _serve(self, call: Call) -> Iterator[str]:
        """A resident kernel, which stops behind each block, and wherever a flag keeps it ``"waiting"``."""
        table, n_chunks, pieces, ids, pitch, numbers_at, sums = call.parameters[:7]
        entry = call.arguments[0]
        threads, gather = call.arguments[1] * call.arguments[4], entry & 0xFF == _ENTRIES[b"gather_resident"]
        if not self._reach("a kernel's rows", table, 64 * n_chunks):
            return
        for row in np.ctypeslib.as_array((ctypes.c_int64 * (8 * n_chunks)).from_address(table)).reshape(-1, 8).copy().tolist():
            staging, first, n_blocks, piece, n_pieces, ready, value, done = row
            self._reach("a kernel's flag", ready, 4)
            while is_behind(ready, value):
                yield "waiting"
            self._reach("a kernel's table", pieces + 32 * piece, 32 * n_pieces)
            self._reach("a kernel's ids", ids + 4 * first, 4 * n_blocks)
            lines = np.ctypeslib.as_array((ctypes.c_int64 * (4 * n_pieces)).from_address(pieces + 32 * piece)).reshape(-1, 4)
            for b, block in enumerate((ctypes.c_int32 * n_blocks).from_address(ids + 4 * first)):
                for base, stride, offset, nbytes in lines.tolist():
                    pair = staging + b * pitch + offset, base + block * stride
                    self._copy("a resident kernel", *(pair if gather else pair[::-1]), nbytes)
                    if entry & _DIGESTS:
                        self.digest(pair[1], nbytes, offset, numbers_at, sums + 16 * (first + b))
                yield "moved"
            if self._reach("a kernel's flag", done, 4):
                cell = ctypes.c_uint32.from_address(done)
                cell.value += threads

    def digest(self, page: int, nbytes: int, offset: int, numbers_at: int, sums: int, alone: int = 0) -> None:
        """Adds what a piece of a page adds to the two numbers at ``sums``, or puts it there ``alone``."""
        table = _TABLE[: 256 + 2 * -(-(offset + nbytes) // 512)]
        if not (self._reach("digests", page, nbytes) and self._reach("digests", sums, 16)):
            return
        if not self._reach("digests", numbers_at, table.nbytes):
            return
        seen = np.ctypeslib.as_array((ctypes.c_uint64 * table.size).from_address(numbers_at))
        assert (seen == table).all(), "another table than the digests'"
        cells = np.ctypeslib.as_array((ctypes.c_uint64 * 2).from_address(sums))
        found = np.array(sum_part(page, nbytes, offset, *_NUMBERS), np.uint64)
        cells[:] = found if alone else cells + found

    def awaits(self, call: Call) -> bool:
        """Whether a kernel that reads has to wait for its flag."""
        flag, value = call.parameters[9:11]
        return flag != 0 and self._reach("a kernel's flag", flag, 4) and is_behind(flag, value)

    def _read(self, call: Call) -> None:
        """A kernel that digests pages or buffers."""
        assert not self.awaits(call), "its flag is raised by what was issued before"
        table, n_pieces, ids, n_blocks, only, numbers_at, sums, record, piece = call.parameters[:9]
        if call.arguments[0] == _ENTRIES[b"read_buffers"]:
            if self._reach("a kernel's table", table, 16 * n_blocks):
                rows = np.ctypeslib.as_array((ctypes.c_int64 * (2 * n_blocks)).from_address(table)).reshape(-1, 2).tolist()
                assert n_pieces == -(-max(nbytes for _, nbytes in rows) // 4096)
                for b, (address, nbytes) in enumerate(rows):
                    for p, at in enumerate(range(0, nbytes, 4096)):
                        where = sums + b * record + p * piece
                        self.digest(address + at, min(4096, nbytes - at), at, numbers_at, where, piece)
        elif self._reach("a kernel's table", table, 32 * n_pieces) and self._reach("a kernel's ids", ids, 4 * n_blocks):
            pieces = np.ctypeslib.as_array((ctypes.c_int64 * (4 * n_pieces)).from_address(table)).reshape(-1, 4).tolist()
            for b, block in enumerate(ids_of(ids, n_blocks, only)):
                for p, (base, stride, offset, nbytes) in enumerate(pieces):
                    where = sums + b * record + p * piece
                    self.digest(base + block * stride, nbytes, offset, numbers_at, where, piece)

    def check_counter(self, counter: int, stream: int) -> None:
        """Of shares of a launch, which leaves it as it was."""
        if self._reach("a kernel's counter", counter, 4):
            assert not ctypes.c_uint32.from_address(counter).value, "shares would be left out"
        assert self.counters.setdefault(counter, stream) == stream, "launches that share work may overlap"

    def array(self, address: int, count: int, kind: Any) -> Any:
        if not self._reach("a kernel's numbers", address, count * ctypes.sizeof(kind)):
            return np.zeros(count, kind)
        return np.ctypeslib.as_array((kind * count).from_address(address))

    def _execute(self, call: Call) -> None:
        if call.name in ("to_host", "to_device"):
            self._copy("a copy", *call.arguments[:3])
        elif call.name == "lines":
            cell = call.parameters
            there, from_pitch, here, to_pitch = self._rectangle(cell)
            for line in range(cell[15]):
                self._copy("a strided copy", here + line * to_pitch, there + line * from_pitch, cell[14])
        elif call.name in ("batch", "batch_12"):
            count = call.arguments[3]
            assert call.stream not in (0, 1), "the legacy default stream is refused"
            assert call.name == "batch" or call.arguments[7], "CUDA 12 writes the index of a copy that failed"
            assert call.arguments[6] == 1 and call.parameters[-1] == 0, "one set of attributes, for every copy"
            for copy in zip(*np.reshape(call.parameters[: 3 * count], (3, count)).tolist(), strict=True):
                self._copy("a batch", *copy)
        elif call.name in ("wait_value", "write_value"):
            self._flag(call.name, *call.arguments[1:3])
        elif call.name == "launch" and call.arguments[0] in (_ENTRIES[b"read_pages"], _ENTRIES[b"read_buffers"]):
            self._read(call)
        elif call.name == "launch" and call.arguments[0] in _CODES:
            for _ in fake_codecs.code(self, call):
                pass
        elif call.name == "launch" and call.arguments[0] in _RESIDENT:
            self.resident.append(self._serve(call))
            self._pump()
        elif call.name == "launch":
            staging, table, n_pieces, ids, n_blocks, pitch, only, counter, numbers_at, sums, record, piece = call.parameters
            entry = call.arguments[0]
            self.check_counter(counter, call.stream)
            if not (self._reach("a kernel's table", table, 32 * n_pieces) and self._reach("a kernel's ids", ids, 4 * n_blocks)):
                return
            pieces = np.ctypeslib.as_array((ctypes.c_int64 * (4 * n_pieces)).from_address(table)).reshape(-1, 4)
            for b, block in enumerate(ids_of(ids, n_blocks, only)):
                for p, (base, stride, offset, nbytes) in enumerate(pieces.tolist()):
                    pair = staging + b * pitch + offset - int(pieces[0, 2]), base + block * stride
                    self._copy("a kernel", *(pair if entry & 0xFF == _ENTRIES[b"gather"] else pair[::-1]), nbytes)
                    if entry & _DIGESTS:
                        self.digest(pair[1], nbytes, offset, numbers_at, sums + b * record + p * piece, piece)


def is_behind(flag: int, value: int) -> bool:
    """Whether a flag has not reached a value; it only grows, and wraps."""
    return bool((ctypes.c_uint32.from_address(flag).value - value) & 0x80000000)


def ids_of(address: int, count: int, only: int) -> list[int]:
    """What a kernel takes for pages."""
    found = list((ctypes.c_int32 * count).from_address(address))
    assert only == -1 or found == [only], "another page than the list's"
    return found


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch, made: FakeGpu | None = None) -> Iterator[FakeGpu]:
    """Makes ``cuda:0`` a :class:`FakeGpu`, which must not have been made to reach beyond its memory."""
    monkeypatch.setattr("kvortex.transfer.lane._AT_ONCE", 1 << 62)  # or what was issued could not be looked at at once
    monkeypatch.setattr(build, "load", lambda name, _: SimpleNamespace(code=b"", entry=name))
    if made is not None and made.lazy:  # who naps keeps it from its work
        monkeypatch.setattr("kvortex.transfer.executor._LONGEST_NAP_S", 1e-5)
    with installed(FakeGpu() if made is None else made) as gpu:
        yield gpu
    assert not gpu.wild, gpu.wild[:3]
    assert not gpu.resident, "a kernel that never ends"
