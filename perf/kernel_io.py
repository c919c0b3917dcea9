"""Linux AIO and io_uring, as far as a benchmark needs them: blocks of one file, some at a time, by bare system calls."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
from collections.abc import Iterable, Iterator

# Of the kernel's headers; those of io_uring are the same everywhere.
_AIO = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}.get(platform.machine())  # setup, destroy, getevents, submit
_URING_SETUP, _URING_ENTER, _READ, _WRITE = 425, 426, 22, 23
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

Request = tuple[int, int, int]  # address, bytes, offset in the file


def _call(number: int, *arguments: int | ctypes.Array[ctypes.c_char]) -> int:
    found = int(_libc.syscall(ctypes.c_long(number), *(_argument(each) for each in arguments)))
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


def _argument(value: int | ctypes.Array[ctypes.c_char]) -> ctypes.c_long | ctypes.Array[ctypes.c_char]:
    return ctypes.c_long(value) if isinstance(value, int) else value


class Aio:
    """Linux AIO. OSError where the kernel has none."""

    def __init__(self, fd: int, depth: int) -> None:
        if _AIO is None:
            raise OSError(f"system calls of AIO on {platform.machine()} are not known here")
        self._fd, self._numbers = fd, _AIO
        context = ctypes.create_string_buffer(8)
        _call(self._numbers[0], depth, context)
        self._context = int.from_bytes(context.raw, "little")
        self._blocks = [ctypes.create_string_buffer(64) for _ in range(depth)]
        self._events = ctypes.create_string_buffer(32 * depth)
        self._depth = depth

    def submit(self, slots: list[int], requests: list[Request], *, write: bool) -> None:
        for slot, (address, nbytes, offset) in zip(slots, requests, strict=True):
            row = struct.pack("<QIiHhIQQq", slot, 0, 0, int(write), 0, self._fd, address, nbytes, offset)
            ctypes.memmove(self._blocks[slot], row, len(row))
        pointers = struct.pack(f"<{len(slots)}Q", *(ctypes.addressof(self._blocks[slot]) for slot in slots))
        if _call(self._numbers[3], self._context, len(slots), ctypes.create_string_buffer(pointers)) != len(slots):
            raise OSError("the kernel took fewer requests than it was given")

    def ended(self) -> Iterator[tuple[int, int]]:
        """Slot and result of what has ended; waits for one."""
        count = _call(self._numbers[2], self._context, 1, self._depth, self._events, 0)
        for at in range(count):
            slot, _, result, _ = struct.unpack_from("<QQqq", self._events, 32 * at)
            yield slot, result

    def close(self) -> None:
        _call(self._numbers[1], self._context)


class Uring:
    """io_uring with plain buffers. OSError where the kernel has none, or forbids it."""

    def __init__(self, fd: int, depth: int) -> None:
        self._fd, parameters = fd, ctypes.create_string_buffer(120)
        self._ring = _call(_URING_SETUP, depth, parameters)
        entries, completions = struct.unpack_from("<2I", parameters)
        self._sq, self._cq = struct.unpack_from("<8I", parameters, 40), struct.unpack_from("<8I", parameters, 80)
        # Since Linux 5.4 both rings are one mapping.
        size = max(self._sq[6] + 4 * entries, self._cq[5] + 16 * completions)
        self._rings = mmap.mmap(self._ring, size, offset=0)
        self._entries = mmap.mmap(self._ring, 64 * entries, offset=0x10000000)
        self._mask, self._done_mask = self._word(self._sq[2]), self._word(self._cq[2])

    def _word(self, at: int) -> int:
        return int(struct.unpack_from("<I", self._rings, at)[0])

    def submit(self, slots: list[int], requests: list[Request], *, write: bool) -> None:
        tail = self._word(self._sq[1])
        for slot, (address, nbytes, offset) in zip(slots, requests, strict=True):
            at = tail & self._mask
            entry = (_WRITE if write else _READ, 0, 0, self._fd, offset, address, nbytes, 0, slot)
            struct.pack_into("<BBHiQQIIQ24x", self._entries, 64 * at, *entry)
            struct.pack_into("<I", self._rings, self._sq[6] + 4 * at, at)
            tail += 1
        struct.pack_into("<I", self._rings, self._sq[1], tail & 0xFFFFFFFF)
        if _call(_URING_ENTER, self._ring, len(slots), 0, 0, 0, 0) != len(slots):
            raise OSError("the kernel took fewer requests than it was given")

    def ended(self) -> Iterator[tuple[int, int]]:
        """Slot and result of what has ended; waits for one."""
        head = self._word(self._cq[0])
        if head == self._word(self._cq[1]):
            _call(_URING_ENTER, self._ring, 0, 1, 1, 0, 0)  # IORING_ENTER_GETEVENTS
        while head != self._word(self._cq[1]):
            slot, result = struct.unpack_from("<Qi", self._rings, self._cq[5] + 16 * (head & self._done_mask))
            head = (head + 1) & 0xFFFFFFFF
            struct.pack_into("<I", self._rings, self._cq[0], head)
            yield slot, result

    def close(self) -> None:
        self._entries.close(), self._rings.close(), os.close(self._ring)


def transfer(engine: Aio | Uring, requests: Iterable[Request], depth: int, *, write: bool) -> None:
    """All requests, ``depth`` at a time; OSError where one goes short."""
    waiting, free = iter(requests), list(range(depth))
    wanted: dict[int, int] = {}
    while True:
        slots, given = [], []
        while free and (request := next(waiting, None)) is not None:
            slots.append(free.pop())
            given.append(request)
            wanted[slots[-1]] = request[1]
        if slots:
            engine.submit(slots, given, write=write)
        if not wanted:
            return
        for slot, result in engine.ended():
            if result != wanted.pop(slot):
                raise OSError(f"a request ended with {result}")
            free.append(slot)
