"""Preparing and starting a transfer in one step, as tests of executors want it."""

from __future__ import annotations

from typing import Any

from kvortex.transfer.executor import Completion, Direction, Executor


def submit_blocks(
    executor: Executor, direction: Direction, blocks: Any, slots: Any, stream: Any, parts: Any = None
) -> Completion:
    completion = executor.prepare_blocks(direction, blocks, slots, stream, parts=parts)
    completion.start()
    return completion


def submit_buffers(executor: Executor, direction: Direction, addresses: Any, sizes: Any, slots: Any, stream: Any) -> Completion:
    completion = executor.prepare_buffers(direction, addresses, sizes, slots, stream)
    completion.start()
    return completion
