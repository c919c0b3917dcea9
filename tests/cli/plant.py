"""Faults for commands to find."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from kvortex.engine import KVortexEngine
from kvortex.errors import TransferError
from kvortex.transfer.executor import Direction
from kvortex.transfer.host import HostExecutor


def flip_a_byte(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every load of the host device leaves one bit wrong in its last page; the list grows by one each time."""
    load, planted = KVortexEngine.load_blocks, []

    def wrong(self: KVortexEngine, keys: Any, block_ids: Any) -> Any:
        ticket = load(self, keys, block_ids)
        ticket.wait()
        assert self.layout is not None
        base, stride, _, nbytes = map(int, self.layout.fragments[-1])
        byte = ctypes.c_uint8.from_address(base + stride * int(block_ids[-1]) + nbytes - 1)
        byte.value ^= 64
        if self.config.block_size > 1:  # not the warm-up's
            planted.append(1)
        return ticket

    monkeypatch.setattr(KVortexEngine, "load_blocks", wrong)
    return planted


def loads_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads of the host device say that they went well."""
    from kvortex.transfer import host

    copy = host.copy_paged
    monkeypatch.setattr(host, "copy_paged", lambda *arguments: copy(*arguments) if arguments[-2] else None)


def loads_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads of the host device cannot be issued."""
    submit = HostExecutor.prepare_blocks

    def refuse(self: HostExecutor, direction: Direction, *others: Any) -> Any:
        if direction is Direction.LOAD:
            raise TransferError("planted")
        return submit(self, direction, *others)

    monkeypatch.setattr(HostExecutor, "prepare_blocks", refuse)
