"""What a caller sees of a transfer: nothing before its end, everything after, and every wait with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np
import pytest

from kvortex.errors import ArgumentError, TransferError, TransferTimeoutError
from kvortex.transfer.executor import Completion, Direction
from kvortex.transfer.ticket import Ticket
from kvortex.transfer.transfer import Transfer


class FakeCompletion(Completion):
    """Ends after a number of questions."""

    def __init__(self, questions: float = 0, error: TransferError | None = None) -> None:
        self.left, self._error = questions, error
        self.streams: list[object] = []
        self.layers: list[int | None] = []
        self.started = True

    def start(self) -> None:
        raise AssertionError("started already")

    def cancel(self) -> None:
        raise AssertionError("started already")

    def query(self) -> bool:
        self.left -= 1
        if self.left < 0:
            self.error, self.seconds = self._error, 0.125
        return self.left < 0

    def add_to(self, stream: object, timeout: float, layer: int | None = None) -> None:
        self.streams.append(stream)
        self.layers.append(layer)


def check_stream(stream: object) -> None:
    if stream not in (None, "a stream"):
        raise ArgumentError("no stream")


class Over:
    over = True


def transfer_of(completion: Completion | None, direction: Direction, slots: list[int]) -> Transfer:
    transfer = Transfer(1, direction, Over(), np.array(slots))
    transfer.completion, transfer.mask = completion, transfer.slots >= 0
    return transfer


def ticket_of(
    completion: FakeCompletion | None, *, direction: Direction = Direction.LOAD, timeout: float = 5.0, nbytes: int = 300
) -> Ticket:
    """A ticket for three blocks, of which the first is a miss; a failed transfer loses the other two."""
    transfer = transfer_of(completion, direction, [-1, 0, 1])
    transfer.nbytes = nbytes

    def settle(transfer: Transfer) -> bool:
        if transfer.completion is not None:
            if not transfer.completion.query():
                return False
            transfer.error = transfer.completion.error
            if transfer.error is not None:
                transfer.mask[1:] = False
        transfer.settled = True
        return True

    return Ticket(transfer, settle, timeout, check_stream, lambda: contextlib.nullcontext(Over()))


FOR_EVER = float("inf")


def test_nothing_is_told_before_the_end() -> None:
    completion = FakeCompletion(FOR_EVER)
    ticket = ticket_of(completion)
    completion.error, completion.seconds = TransferError("too early"), 1.0
    assert not ticket.done() and ticket.mask.tolist() == [False] * 3
    assert ticket.error is None and ticket.seconds == 0.0
    assert ticket.nbytes == 300 and ticket.kind == "load"
    assert repr(ticket) == "<Ticket load of 3 blocks, 300 bytes, running>"


def test_everything_is_told_after_the_end() -> None:
    ticket = ticket_of(FakeCompletion(), direction=Direction.SAVE)
    assert ticket.done() and ticket.mask.tolist() == [False, True, True]
    assert ticket.error is None and ticket.seconds == 0.125
    assert repr(ticket) == "<Ticket save of 3 blocks, 300 bytes, done>"


def test_a_failure_is_an_error_and_a_mask_and_no_exception() -> None:
    error = TransferError("the GPU fell over")
    ticket = ticket_of(FakeCompletion(3, error))
    assert ticket.wait().tolist() == [False] * 3 and ticket.error is error


def test_the_mask_is_a_copy() -> None:
    ticket = ticket_of(FakeCompletion())
    ticket.mask[:] = False
    ticket.wait()[:] = False
    assert ticket.mask.tolist() == [False, True, True]


def test_done_never_blocks() -> None:
    ticket = ticket_of(FakeCompletion(FOR_EVER))
    began = time.perf_counter()
    assert not any(ticket.done() for _ in range(100))
    assert time.perf_counter() - began < 1


def test_nothing_to_move_is_done_at_once() -> None:
    ticket = ticket_of(None, nbytes=0)
    assert ticket.done() and ticket.wait(0).tolist() == [False, True, True]
    assert ticket.error is None and ticket.seconds == 0.0 and ticket.nbytes == 0
    ticket.add_to(None)


def test_wait_ends_when_the_transfer_does() -> None:
    ticket = ticket_of(FakeCompletion(20))
    assert ticket.wait().tolist() == [False, True, True]


def test_wait_has_the_engines_deadline_or_its_own() -> None:
    ticket = ticket_of(FakeCompletion(FOR_EVER), timeout=0.03)
    for timeout, said in ((None, 0.03), (0.01, 0.01), (0, 0.0), (0.0, 0.0)):
        began = time.monotonic()
        with pytest.raises(TransferTimeoutError, match=f"a load of 300 bytes was not done after {said} s"):
            ticket.wait(timeout)
        assert said <= time.monotonic() - began < said + 1
    assert isinstance(pytest.raises(TransferTimeoutError, ticket.wait, 0).value, TimeoutError)


@pytest.mark.parametrize("timeout", [float("nan"), -1, -0.001, "1", True, [1], 1j])
def test_what_is_no_timeout_is_refused(timeout: object) -> None:
    with pytest.raises(ArgumentError, match="must be a number of seconds"):
        ticket_of(FakeCompletion()).wait(timeout)


def test_a_wait_may_be_repeated_after_its_deadline() -> None:
    completion = FakeCompletion(FOR_EVER)
    ticket = ticket_of(completion)
    with pytest.raises(TransferTimeoutError):
        ticket.wait(0)
    completion.left = 2
    assert ticket.wait().any()


def test_await_gives_the_mask_and_lets_others_run() -> None:
    completion = FakeCompletion(FOR_EVER)
    ticket = ticket_of(completion)

    async def release() -> str:
        completion.left = 1
        return "ran"

    async def both() -> tuple[np.ndarray, str]:
        return await asyncio.gather(ticket, release())

    mask, word = asyncio.run(both())
    assert mask.tolist() == [False, True, True] and word == "ran"


def test_await_has_a_deadline() -> None:
    async def wait() -> None:
        await ticket_of(FakeCompletion(FOR_EVER), timeout=0.02)

    began = time.monotonic()
    with pytest.raises(TransferTimeoutError, match="a load of 300 bytes was not done after 0.02 s"):
        asyncio.run(asyncio.wait_for(wait(), 10))  # a broken deadline fails here, and does not hang
    assert 0.02 <= time.monotonic() - began < 1


def test_await_can_be_cancelled_and_the_transfer_goes_on() -> None:
    completion = FakeCompletion(FOR_EVER)
    ticket = ticket_of(completion)

    async def cancel() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ticket._poll_async(), 0.01)

    asyncio.run(cancel())
    completion.left = 0
    assert ticket.wait().any()


def test_add_to_refuses_what_is_no_stream_whatever_there_is_to_wait_for() -> None:
    running, nothing = FakeCompletion(FOR_EVER), None
    for completion in (running, FakeCompletion(), nothing):
        with pytest.raises(ArgumentError, match="no stream"):
            ticket_of(completion).add_to("something else")
    assert not running.streams


def test_only_layer_wise_saves_take_layers() -> None:
    for direction in Direction:
        ticket = ticket_of(FakeCompletion(FOR_EVER), direction=direction)
        assert ticket.missing_layers == ()
        for call in (lambda ticket=ticket: ticket.save_layer(0), ticket.abort):
            with pytest.raises(ArgumentError, match="layerwise=True"):
                call()


def test_a_tickets_transfer_knows_whether_somebody_holds_it() -> None:
    ticket = ticket_of(FakeCompletion(FOR_EVER))
    transfer = ticket._transfer
    assert not transfer.is_deserted()
    del ticket
    assert transfer.is_deserted()
    call = Over()
    call.over = False
    made = Transfer(1, Direction.SAVE, call, np.array([0]))
    assert not made.is_deserted(), "there will be a ticket, or the call will be over"
    call.over = True
    assert made.is_deserted()


def test_add_to_reaches_the_transfer_and_those_it_depends_on() -> None:
    mine, other = FakeCompletion(FOR_EVER), FakeCompletion(FOR_EVER)
    ticket = ticket_of(mine, direction=Direction.SAVE)
    ticket._transfer.after = [
        (transfer_of(other, Direction.SAVE, [0]), np.array([0])),
        (transfer_of(None, Direction.SAVE, [-1]), np.array([1])),
    ]
    ticket.add_to("a stream")
    assert mine.streams == other.streams == ["a stream"]
