"""A driver that refuses at any one call: no work after it, ``done`` behind what was issued, and the context put back."""

from __future__ import annotations

import pytest

from tests.transfer.issuing import CALLER_EVENT, COPY_EVENT, DONE, JOIN_STREAM, PLANS, START, Lane
from tests.transfer.recorder import Recorder, predecessors

WORK = ("launch", "to_host", "to_device", "lines", "batch")
CODE = 719


def calls_of(name: str, to_host: bool) -> int:
    recorder = Recorder()
    Lane(3, to_host, 1).issue(recorder, PLANS[name])
    return len(recorder.calls)


CASES = [
    pytest.param(name, to_host, at, id=f"{name}-{'save' if to_host else 'load'}-{at}")
    for name in ("staged", "parts", "direct", "batched")
    for to_host in (True, False)
    for at in range(calls_of(name, to_host))
]


def issued(name: str, to_host: bool, fails: dict[int, int]) -> tuple[tuple[int, int], Lane, Recorder]:
    lane, recorder = Lane(3, to_host, 1), Recorder(fails)
    return lane.issue(recorder, PLANS[name]), lane, recorder


@pytest.mark.parametrize(("name", "to_host", "at"), CASES)
def test_a_refusal_at_any_call(name: str, to_host: bool, at: int) -> None:
    (first, last), lane, recorder = issued(name, to_host, {at: CODE})
    calls, names = recorder.calls, recorder.names
    if at == 0:
        assert (first, last) == (CODE, 0) and names == ["push"], "no context, so nothing to pop and nothing to record"
        return
    assert names[0] == "push" and names[-1] == "pop" and names.count("pop") == 1
    apart = [COPY_EVENT] * lane.apart(PLANS[name])
    ends = {*lane.joins.tolist(), *apart, DONE}
    failed = calls[at]
    is_end = failed.name == "record" and failed.arguments[0] in ends
    is_end |= failed.name == "wait" and failed.arguments[0] == JOIN_STREAM
    if failed.name == "pop":
        assert (first, last) == (0, 0), "everything was issued and joined"
        return
    assert (first, last) == ((0, CODE) if is_end else (CODE, 0))
    if not is_end:
        assert not any(call.name in WORK for call in calls[at + 1 :]), "work after a refusal"
        assert not any(call.arguments[0] == CALLER_EVENT for call in calls[at + 1 :] if call.name == "record")
    others = {CALLER_EVENT, START, *lane.turns.ravel().tolist()}
    tail = [call.arguments[0] for call in calls if call.name == "record" and call.arguments[0] not in others]
    joined = [int(lane.joins[(1 + k) % 3]) for k in range(3)]
    assert tail == [*joined, *apart, DONE], "each stream is joined, also after an error"
    if last == 0:  # then done must follow everything that was issued
        before = predecessors(calls, {at: CODE})
        done = next(i for i, call in enumerate(calls) if call.name == "record" and call.arguments[0] == DONE)
        assert {i for i, call in enumerate(calls) if call.name in WORK and i != at} <= before[done]


@pytest.mark.parametrize("at", range(1, 1 + 3 * 2))
def test_a_wait_for_an_event_that_is_refused(at: int) -> None:
    lane, recorder = Lane(3, True, after=[0xA1, 0xA2]), Recorder({at: CODE})
    assert lane.issue(recorder, PLANS["staged"]) == (CODE, 0)
    assert recorder.calls[at].name == "wait" and not any(call.name in WORK for call in recorder.calls)


@pytest.mark.parametrize("to_host", [True, False])
def test_a_lost_context(to_host: bool) -> None:
    """Every call behind the first fails: the first code of each kind is told, nothing is retried."""
    (first, last), lane, recorder = issued("staged", to_host, {at: 700 + at for at in range(1, 100)})
    assert (first, last) == (701, 702) and recorder.names == ["push", *["record"] * 6, "pop"]


def test_the_first_error_is_the_one_told() -> None:
    total = calls_of("staged", True)
    (first, last), _, _ = issued("staged", True, {6: 11, total - 2: 12, total - 3: 13})
    assert first == 11
    (first, last), _, _ = issued("staged", True, {total - 2: 12, total - 3: 13})
    assert (first, last) == (0, 13)
