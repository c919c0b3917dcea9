"""The calls that put a plan on a GPU: which, with what, and what they are ordered after."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvortex.devices import driver as cu
from kvortex.transfer import digesting as dg
from kvortex.transfer.issue.cells import COPIED, COUNTER_BYTES, HANDED
from kvortex.transfer.plan import (
    FIRST_BLOCK,
    FIRST_COPY,
    FIRST_LAUNCH,
    FIRST_PIECE,
    INSTEAD,
    N_BLOCKS,
    N_COPIES,
    N_LAUNCHES,
    N_PIECES,
    Int64s,
    Plan,
)
from tests.transfer.issuing import (
    CALLER,
    CALLER_EVENT,
    CONTEXT,
    COPY_STREAM,
    COUNTERS,
    DONE,
    IDS,
    IDS_IN_VRAM,
    JOIN_STREAM,
    KERNEL,
    MARK,
    PLANS,
    SLOT_BYTES,
    START,
    STATUS,
    TABLE,
    THREADS,
    Lane,
    staged,
)
from tests.transfer.recorder import Call, Recorder, predecessors

WORK = ("launch", "to_host", "to_device", "lines", "batch", "batch_12")
STREAM_ORDER, OVERLAP = 1, 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM, CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE of cuda.h
EVERY = list(itertools.product(PLANS, [True, False], [(1, 0), (3, 0), (3, 2), (20, 7)]))


def issued(name: str, to_host: bool, shape: tuple[int, int]) -> tuple[Lane, Plan, Recorder]:
    lane, plan, recorder = Lane(shape[0], to_host, shape[1]), PLANS[name], Recorder()
    assert lane.issue(recorder, plan) == (0, 0)
    return lane, plan, recorder


def meets(lane: Lane, plan: Plan) -> int:
    """The stream that ``done`` is on."""
    used = lane.used(plan)
    return JOIN_STREAM if len(used) > 1 else used[0]


def work_of(lane: Lane, plan: Plan) -> list[Call]:
    """Launches and copies that a plan stands for, chunk by chunk."""
    calls = []
    for at, chunk in enumerate(plan.chunks.tolist()):
        k = (lane.turn + at) % lane.count
        stream, base = int(lane.streams[k]), chunk[INSTEAD] or (int(lane.buffers[k]) if chunk[N_PIECES] else 0)
        copies, counter = [], COUNTERS + COUNTER_BYTES * k  # launches of a stream follow one another, and share one
        if plan.batch.size:
            calls.append(batch_of(lane.to_host, plan.batch[:, chunk[FIRST_COPY] : chunk[FIRST_COPY] + chunk[N_COPIES]], stream))
            continue
        for device, host, *rest in plan.copies[chunk[FIRST_COPY] : chunk[FIRST_COPY] + chunk[N_COPIES]].tolist():
            copies.append(copy_of(lane.to_host, base + device, host, rest, COPY_STREAM if lane.apart(plan) else stream))
        launches = []
        if chunk[N_LAUNCHES]:
            for row in plan.launches[chunk[FIRST_LAUNCH] : chunk[FIRST_LAUNCH] + chunk[N_LAUNCHES]].tolist():
                bases = (base, int(lane.works[k]), 0, IDS_IN_VRAM, SUMS, STATUS, counter, 0, 0, 0, 0, 0)
                values = tuple(value + added for value, added in zip(row[4:], bases, strict=True))
                launches.append(Call("launch", (row[0], row[1], 1, 1, row[2], 1, 1, 0, stream, 0, 0), values))
        elif chunk[N_PIECES]:
            table, ids = TABLE + 32 * chunk[FIRST_PIECE], IDS + 4 * chunk[FIRST_BLOCK]
            values = (base, table, chunk[N_PIECES], ids, chunk[N_BLOCKS], plan.pitch, -1, counter, 0, 0, 0, 0)
            ctas = min(lane.max_ctas, -(-chunk[N_PIECES] * chunk[N_BLOCKS] // (THREADS // 32)))
            launches = [Call("launch", (KERNEL, ctas, 1, 1, THREADS, 1, 1, 0, stream, 0, 0), values)]
        calls += launches + copies if lane.to_host else copies + launches
    return calls


def copy_of(to_host: bool, device: int, host: int, rest: list[int], stream: int) -> Call:
    nbytes, lines, pitch, host_pitch = rest
    if lines == 1:
        pair = (host, device) if to_host else (device, host)
        return Call("to_host" if to_host else "to_device", (*pair, nbytes, stream))
    there, here = (0, 0, 2, 0, device, 0, pitch), (0, 0, 1, host, 0, 0, host_pitch)
    return Call("lines", (0, stream), (*there, *here, nbytes, lines) if to_host else (*here, *there, nbytes, lines))


def batch_of(to_host: bool, rows: Int64s, stream: int) -> Call:
    device, host, nbytes = rows.tolist()
    lists = (host, device, nbytes) if to_host else (device, host, nbytes)
    values = (*itertools.chain(*lists), STREAM_ORDER, 0, 0, 0, 0, OVERLAP, 0)
    return Call("batch", (0, 0, 0, len(nbytes), 0, 0, 1, stream), values)


def without_pointers(call: Call) -> Call:
    """A call without the address of its parameters, whose values are what counts."""
    if call.name == "lines":
        return Call(call.name, (0, call.arguments[1]), call.parameters)
    if call.name == "batch":
        return Call(call.name, (0, 0, 0, call.arguments[3], 0, 0, *call.arguments[6:]), call.parameters)
    return Call(call.name, (*call.arguments[:9], 0, *call.arguments[10:]), call.parameters) if call.name == "launch" else call


@pytest.mark.parametrize(("name", "to_host", "shape"), EVERY)
def test_every_chunk_is_launched_and_copied_with_the_right_numbers(name: str, to_host: bool, shape: tuple[int, int]) -> None:
    """A save gathers before it copies, a load copies before it scatters; chunks are dealt to streams in a ring."""
    lane, plan, recorder = issued(name, to_host, shape)
    assert [without_pointers(call) for call in recorder.calls if call.name in WORK] == work_of(lane, plan)


@pytest.mark.parametrize(("name", "to_host", "shape"), EVERY)
def test_the_context_is_current_around_everything(name: str, to_host: bool, shape: tuple[int, int]) -> None:
    _, _, recorder = issued(name, to_host, shape)
    assert recorder.calls[0] == Call("push", (CONTEXT,)) and recorder.names[-1] == "pop" and recorder.calls[-1].arguments[0]
    assert recorder.names.count("push") == recorder.names.count("pop") == 1


@pytest.mark.parametrize(("name", "to_host", "shape"), EVERY)
def test_all_work_is_ordered_after_the_caller_and_before_done(name: str, to_host: bool, shape: tuple[int, int]) -> None:
    lane, plan, recorder = issued(name, to_host, shape)
    calls = recorder.calls
    before = predecessors(calls)
    caller = calls.index(Call("record", (CALLER_EVENT, CALLER)))
    start, done = (next(at for at, c in enumerate(calls) if c.name == "record" and c.arguments[0] == e) for e in (START, DONE))
    work = [at for at, call in enumerate(calls) if call.name in WORK]
    assert all(caller in before[at] for at in work), "work that does not wait for the caller's stream"
    assert set(work) <= before[done], "done is reached before all work is"
    used, apart = lane.used(plan), lane.apart(plan)
    first = COPY_STREAM if apart and not to_host else used[0]
    assert caller in before[start] and calls[start].stream == first and start < min(work)
    assert calls[done].stream == (JOIN_STREAM if apart else meets(lane, plan)) and start in before[done]
    assert {call.stream for call in calls if call.name in WORK} == {*used, *[COPY_STREAM] * apart}
    touched = {call.stream for call in calls if call.name not in ("push", "pop")}
    joined = [JOIN_STREAM] if len(plan.marks) or apart else [meets(lane, plan)]
    assert touched == {CALLER, *joined, *used, *[COPY_STREAM] * apart}, "a stream without chunks must not be made to wait"
    assert sum(call.stream == CALLER for call in calls if call.name in ("record", "wait", *WORK)) == 1


@pytest.mark.parametrize("events", [[0xA1], [0xA1, 0xA2, 0xA3]])
@pytest.mark.parametrize("name", PLANS)
def test_all_work_is_ordered_after_events_that_were_recorded_before(name: str, events: list[int]) -> None:
    """On streams of which the call need know nothing: none is touched."""
    lane, plan, recorder = Lane(3, True, 1, after=events), PLANS[name], Recorder()
    recorder.calls += [Call("record", (event, 0xFA00 + event)) for event in events]
    assert lane.issue(recorder, plan) == (0, 0)
    calls, before = recorder.calls, predecessors(recorder.calls)
    work = [at for at, call in enumerate(calls) if call.name in WORK]
    assert work and all(set(range(len(events))) <= before[at] for at in work)
    touched = {call.stream for call in calls[len(events) :] if call.name not in ("push", "pop")}
    joined = [JOIN_STREAM] if len(lane.used(plan)) > 1 or lane.apart(plan) else []
    assert touched == {*joined, *lane.used(plan), *[COPY_STREAM] * lane.apart(plan)}


READER, DIGEST_STREAM, DIGEST_EVENT, SUMS, PINNED, NUMBERS = 0xDD, 0x5D00, 0xED00, 0x50000, 0x60000, 0x70000


def digest_of(*, reads: bool, apart: int) -> Int64s:
    cells = dg.NO_DIGESTS.copy()
    cells[dg.NUMBERS], cells[dg.SUMS], cells[dg.SUMS_HOST], cells[dg.SUMS_BYTES] = NUMBERS, SUMS, PINNED, 64
    cells[dg.SENT_TO], cells[dg.SENT_FROM], cells[dg.SENT_BYTES] = SUMS, PINNED, 64
    cells[dg.STREAM], cells[dg.EVENT] = DIGEST_STREAM, DIGEST_EVENT
    cells[dg.RECORD_BYTES], cells[dg.PIECE_BYTES] = 16 * max(1, apart), 16 if apart else 0
    if reads:
        cells[dg.KERNEL], cells[dg.CTAS], cells[dg.THREADS] = READER, 5, 128
    return cells


def copies_of_sums(calls: list[Call]) -> list[int]:
    copies = [at for at, call in enumerate(calls) if call.name in ("to_host", "to_device")]
    return [at for at in copies if {SUMS, PINNED} <= {*calls[at].arguments}]


@pytest.mark.parametrize("shape", [(1, 0), (3, 0), (3, 2), (20, 7)])
@pytest.mark.parametrize("name", ["direct", "one buffer", "batched"])
@pytest.mark.parametrize("apart", [0, 7])
@pytest.mark.parametrize("to_host", [True, False])
def test_what_only_reads_is_beside_a_save_and_behind_a_load(
    to_host: bool, apart: int, name: str, shape: tuple[int, int]
) -> None:
    lane, plan, recorder = Lane(shape[0], to_host, shape[1], digest=digest_of(reads=True, apart=apart)), PLANS[name], Recorder()
    assert lane.issue(recorder, plan) == (0, 0)
    calls, before = recorder.calls, predecessors(recorder.calls)
    (read,) = (at for at, call in enumerate(calls) if call.name == "launch")
    sums = copies_of_sums(calls)
    moves = [at for at, call in enumerate(calls) if call.name in WORK and at not in (read, *sums)]
    done = next(at for at, call in enumerate(calls) if call.name == "record" and call.arguments[0] == DONE)
    assert calls.index(Call("record", (CALLER_EVENT, CALLER))) in before[read], "pages are read before they are written"
    assert {read, *moves, *sums} <= before[done], "and while others may overwrite them"
    if to_host:
        assert min(moves) < read and not before[read] & set(moves), "the link waits neither for these calls nor for the kernel"
    else:
        assert set(moves) <= before[read], "pages are read before all of them are there"
    if apart:
        assert not sums and calls[read].parameters[5:9] == (NUMBERS, SUMS, 16 * apart, 16)
        assert any(call.stream == DIGEST_STREAM for call in calls if call.name not in ("push", "pop")) == to_host
    else:
        sent, back = sums
        assert sent in before[read] and read in before[back]


@pytest.mark.parametrize("apart", [0, 7])
@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize("name", ["staged", "parts", "layers", "one record"])
def test_each_launch_knows_where_its_sums_belong(name: str, to_host: bool, apart: int) -> None:
    lane, plan, recorder = Lane(3, to_host, 1, digest=digest_of(reads=False, apart=apart)), PLANS[name], Recorder()
    assert lane.issue(recorder, plan) == (0, 0)
    calls, before = recorder.calls, predecessors(recorder.calls)
    launches = [at for at, call in enumerate(calls) if call.name == "launch"]
    for at, chunk in zip(launches, plan.chunks.tolist(), strict=True):
        first = SUMS + 16 * (apart * chunk[FIRST_BLOCK] + chunk[FIRST_PIECE] if apart else chunk[FIRST_BLOCK])
        only, _, *digests = calls[at].parameters[6:]
        assert (only, *digests) == (-1, NUMBERS, first, 16 * max(1, apart), 16 if apart else 0)
    sums = copies_of_sums(calls)
    done = next(at for at, call in enumerate(calls) if call.name == "record" and call.arguments[0] == DONE)
    if apart:
        assert not sums and not any(call.stream == DIGEST_STREAM for call in calls if call.name not in ("push", "pop"))
    else:
        sent, back = sums
        assert all(sent in before[at] and at in before[back] for at in launches) and back in before[done]


@pytest.mark.parametrize("shape", [(1, 0), (3, 0), (3, 2), (20, 7)])
@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize("name", ["coded", "one coded"])
def test_a_codecs_launches_find_ids_sums_and_buffers_ready(name: str, to_host: bool, shape: tuple[int, int]) -> None:
    """What is sent to VRAM is there before each of them, and read back behind all; a chunk's own are one behind another, and
    those of the chunk that has its buffer next come behind all that this one has to do with it."""
    lane, plan, recorder = Lane(*shape[:1], to_host, shape[1], digest=digest_of(reads=False, apart=0)), PLANS[name], Recorder()
    assert lane.issue(recorder, plan) == (0, 0)
    calls, before = recorder.calls, predecessors(recorder.calls)
    launches = [at for at, call in enumerate(calls) if call.name == "launch"]
    sent, back = copies_of_sums(calls)
    assert len(launches) == 2 * len(plan.chunks) and all(sent in before[at] and at in before[back] for at in launches)
    copies = [at for at, call in enumerate(calls) if call.name in WORK and at not in (sent, back, *launches)]
    of_chunk = np.repeat(np.arange(len(plan.chunks)), plan.chunks[:, N_COPIES]).tolist()
    own: list[list[int]] = [launches[2 * chunk :][:2] for chunk in range(len(plan.chunks))]
    for at, chunk in zip(copies, of_chunk, strict=True):
        assert all(at in before[launch] for launch in own[chunk]) != to_host == (set(own[chunk]) <= before[at])
    for chunk, (first, second) in enumerate(own):
        assert first in before[second]
        earlier = chunk - lane.count
        if earlier >= 0:
            work = {*own[earlier], *(at for at, of in zip(copies, of_chunk, strict=True) if of == earlier)}
            mine = first if to_host else min(at for at, of in zip(copies, of_chunk, strict=True) if of == chunk)
            assert work <= before[mine]


@pytest.mark.parametrize("shape", [(1, 0), (3, 0), (3, 2), (20, 7)])
@pytest.mark.parametrize("to_host", [True, False])
def test_a_mark_is_behind_its_chunks_and_holds_up_no_others(to_host: bool, shape: tuple[int, int]) -> None:
    lane, plan, recorder = issued("layers", to_host, shape)
    before, calls = predecessors(recorder.calls), recorder.calls
    work = [at for at, call in enumerate(calls) if call.name in WORK]
    of_chunk = np.repeat(np.arange(len(plan.chunks)), 1 + plan.chunks[:, N_COPIES])
    assert len(plan.marks) == 3 and len(work) == len(of_chunk)
    for at, mark in enumerate(plan.marks.tolist()):
        recorded = calls.index(Call("record", (MARK + at, JOIN_STREAM)))
        needed = {position for position, chunk in zip(work, of_chunk, strict=True) if chunk < mark}
        assert needed == before[recorded] & set(work)
    assert not any(calls[p].stream == JOIN_STREAM for at in work for p in before[at])


@pytest.mark.parametrize("to_host", [True, False])
def test_copies_go_one_chunk_after_another_and_launches_wait_for_no_other_stream(to_host: bool) -> None:
    lane, plan, recorder = issued("staged", to_host, (3, 0))
    calls, before = recorder.calls, predecessors(recorder.calls)
    work = [at for at, call in enumerate(calls) if call.name in WORK]
    launches, copies = ([at for at in work if (calls[at].name == "launch") is kernel] for kernel in (True, False))
    chunk_of = dict(zip(copies, np.repeat(np.arange(len(plan.chunks)), plan.chunks[:, N_COPIES]), strict=True))
    for at in copies:
        assert {p for p in copies if chunk_of[p] < chunk_of[at]} <= before[at]
    for chunk, at in enumerate(launches):
        waited_for = {chunk_of[p] for p in copies if p in before[at]}
        # A save's gather needs its buffer to be empty, a load's scatter its own copy.
        assert waited_for == set(range(chunk - 2 if to_host else chunk + 1))
        assert chunk > 2 or not before[at] & set(launches)
    assert len(lane.used(plan)) == 3


@pytest.mark.parametrize("to_host", [True, False])
def test_what_uses_a_buffer_first_waits_for_the_transfer_before(to_host: bool) -> None:
    """A save's kernel for the copies that empty it, a load's copy for the kernel that does."""
    lane, plan, recorder = issued("staged", to_host, (3, 2))
    first = next(at for at, call in enumerate(recorder.calls) if call.name in WORK)
    waits = (int(lane.streams[2]), int(lane.turns[COPIED, 2])) if to_host else (COPY_STREAM, int(lane.turns[HANDED, 2]))
    assert recorder.calls[first - 1] == Call("wait", (*waits, 0))
    ends = {call.arguments for call in recorder.calls if call.name == "record"}
    behind = {(int(lane.turns[COPIED, at]), COPY_STREAM) for at in range(3)}
    behind |= {(int(lane.turns[HANDED, at]), int(lane.streams[at])) for at in range(3)}
    assert behind <= ends, "the next transfer has something to wait for"


@pytest.mark.parametrize("name", ["staged", "direct", "batched"])
def test_one_stream_waits_for_nobody(name: str) -> None:
    lane, _, recorder = issued(name, True, (1, 0))
    assert [call.arguments for call in recorder.calls if call.name == "wait"] == [
        (int(lane.streams[0]), CALLER_EVENT, 0)
    ]  # fmt: skip


@pytest.mark.parametrize("to_host", [True, False])
def test_the_batch_of_cuda_12_also_takes_the_address_of_a_failed_copys_index(to_host: bool) -> None:
    lane, plan, recorder = Lane(3, to_host, 1), PLANS["batched"], Recorder()
    recorder.functions[cu.COPY_BATCH] = 0
    assert lane.issue(recorder, plan) == (0, 0)
    calls = [call for call in recorder.calls if call.name in WORK]
    assert [call.name for call in calls] == ["batch_12"] * 3 and all(call.arguments[7] for call in calls)
    others = [Call("batch", (*call.arguments[:7], call.arguments[8]), call.parameters) for call in calls]
    assert [without_pointers(call) for call in others] == work_of(lane, plan)
    apart = {call.arguments[7] - call.arguments[5] for call in calls}
    assert apart == {8}, "what the driver writes there must not be what it reads"


@pytest.mark.parametrize("name", ["direct", "batched"])
def test_direct_copies_do_not_wait_for_each_other(name: str) -> None:
    _, _, recorder = issued(name, True, (3, 0))
    calls, before = recorder.calls, predecessors(recorder.calls)
    for at, call in enumerate(calls):
        if call.name in WORK:
            assert all(calls[p].stream == call.stream for p in before[at] if calls[p].name in WORK)


def test_many_ctas_for_much_and_few_for_little() -> None:
    lane, recorder = Lane(1, True, max_ctas=1000), Recorder()
    lane.issue(recorder, staged(4, 2, buffer_bytes=100 * SLOT_BYTES))
    ctas = [call.arguments[1] for call in recorder.calls if call.name == "launch"]
    assert ctas == [7, 7], "2 records of 7 pieces, 2 warps a CTA"


def test_the_account_of_order_sees_a_missing_wait() -> None:
    """The tests above rest on ``predecessors``: without the waits, nothing is ordered."""
    _, _, recorder = issued("staged", True, (3, 0))
    calls = [call for call in recorder.calls if call.name != "wait"]
    before = predecessors(calls)
    done = next(at for at, call in enumerate(calls) if call.name == "record" and call.arguments[0] == DONE)
    assert not any(calls[at].name in WORK for at in before[done])
