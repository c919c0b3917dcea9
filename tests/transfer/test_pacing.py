"""What a thread issues beside a computing model: kernels when they can begin, and copies at the pace of a share of the link."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.devices import driver as cu
from kvortex.devices.asking import NOT_READY
from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.executor import Direction, poll
from kvortex.transfer.issue.cells import (
    CLOCK,
    COPIED,
    DUE,
    FS_OF_BYTE,
    HURRIED,
    ISSUED,
    LANE_CELLS,
    NAP,
    OUTCOME_CELLS,
    PACED,
    QUEUED,
)
from kvortex.transfer.issue.dma import SCRATCH_CELLS
from kvortex.transfer.issue.pacing import begin_turns, hurry, nap, pace, take_turn
from kvortex.transfer.issue.submitting import _STREAMED_LIKE, STREAMED
from kvortex.transfer.plan import CHUNK_COLUMNS, COPY_BYTES, COPY_COLUMNS, FIRST_COPY, LINES, N_COPIES, Int64s, Plan
from tests.engine.coded import Coded
from tests.fake_gpu import fake_gpu
from tests.late_gpu import LateGpu
from tests.pages import PagedCache, Tensor, assert_same, keys_of
from tests.transfer.issuing import Lane, coded, staged
from tests.transfer.recorder import Call, Recorder, predecessors

PLANS = {"staged": staged(12), "coded": coded(12), "one chunk": staged(2)}
COPIES = {"to_host", "to_device", "lines"}
CHUNKS = [(name, streams, turn) for name in PLANS for streams, turn in ((3, 0), (3, 2), (5, 4))]


class Gpu(Recorder):
    """Events pass when they have been asked for ``patience`` times since they were recorded; ``passed`` are those that have."""

    def __init__(self, patience: int) -> None:
        self.patience, self.asked, self.passed = patience, dict[int, int](), set[int]()
        self.questions, self.at = 0, list[float]()
        super().__init__(also=self.see, answer=self.tell)

    def see(self, call: Call) -> None:
        self.at.append(time.monotonic())
        if call.name == "record":
            self.asked[call.arguments[0]] = 0
            self.passed.discard(call.arguments[0])

    def tell(self, which: int, event: int, *_: int) -> int:
        if which != cu.EVENT_QUERY:
            return 0
        self.questions += 1
        self.asked[event] = self.asked.get(event, self.patience) + 1
        if self.asked[event] <= self.patience:
            return NOT_READY
        self.passed.add(event)
        return 0


class Watched(Gpu):
    """Takes down which events had passed when a kernel was launched."""

    def __init__(self, patience: int) -> None:
        super().__init__(patience)
        self.launched: list[tuple[int, set[int], int]] = []  # stream, events, copies before

    def see(self, call: Call) -> None:
        if call.name == "launch":
            self.launched.append((call.stream, set(self.passed), sum(name in COPIES for name in self.names)))
        super().see(call)


def unpaced(lane: Lane, plan: Plan) -> Recorder:
    recorder, other = Recorder(), Lane(lane.count, lane.to_host, lane.turn)
    assert other.issue(recorder, plan) == (0, 0)
    return recorder


def work(recorder: Recorder) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    made = [call for call in recorder.calls if call.name in COPIES | {"launch"}]
    return sorted((call.name, (*call.arguments[:9], *call.arguments[10:]), call.parameters) for call in made)


@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize(("name", "streams", "turn"), CHUNKS)
def test_a_kernel_is_launched_when_its_copies_have_ended(name: str, streams: int, turn: int, to_host: bool) -> None:
    lane, plan, gpu = Lane(streams, to_host, turn, place=1), PLANS[name], Watched(10)
    copied = dict(zip(lane.streams.tolist(), lane.turns[COPIED].tolist(), strict=True))
    gpu.asked = dict.fromkeys(copied.values(), 0)  # what an earlier transfer copied is on its way too
    assert lane.issue(gpu, plan) == (0, 0)
    each, chunks = len(gpu.launched) // len(plan.chunks), len(plan.chunks)
    first_of = gpu.launched[::each]
    assert len(first_of) == chunks
    for at, (stream, passed, copies) in enumerate(first_of):
        if to_host:  # the copies that emptied the buffer; all of those behind earlier kernels are issued
            assert copied[stream] in passed
            assert copies == plan.chunks[at, FIRST_COPY]
        elif at < chunks - 1:  # its own, while others are issued already
            assert copied[stream] in passed
            last = plan.chunks[min(at + streams, chunks) - 1]
            assert copies == last[FIRST_COPY] + last[N_COPIES]
        else:  # those before its own, so that another transfer's follow without a gap
            assert copied[int(lane.streams[(turn + at - 1) % streams])] in passed
            assert copied[stream] not in passed


@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize(("name", "streams", "turn"), CHUNKS)
def test_the_same_work_is_ordered_as_ever(name: str, streams: int, turn: int, to_host: bool) -> None:
    lane, plan, gpu = Lane(streams, to_host, turn, place=1), PLANS[name], Gpu(2)
    assert lane.issue(gpu, plan) == (0, 0)
    other = unpaced(lane, plan)
    assert work(gpu) == work(other) and sorted(gpu.names) == sorted(other.names)
    kept = [
        {(a.calls[k].name, a.calls[k].arguments[:9], call.name, call.arguments[:9])
         for call, before in zip(a.calls, predecessors(a.calls), strict=True) if call.name in COPIES | {"launch"}
         for k in before if a.calls[k].name in COPIES | {"launch"}}
        for a in (gpu, other)
    ]  # fmt: skip
    assert kept[1] <= kept[0], "what was ordered without pauses is so with them"


@pytest.mark.parametrize("to_host", [True, False])
def test_without_a_place_in_the_queue_nobody_is_asked(to_host: bool) -> None:
    lane, gpu = Lane(3, to_host), Gpu(5)
    assert lane.issue(gpu, PLANS["staged"]) == (0, 0)
    assert gpu.questions == 0


@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize("patience", [1, 4])
def test_who_is_hurried_pauses_no_more(to_host: bool, patience: int) -> None:
    lane, plan = Lane(3, to_host, place=7), PLANS["staged"]

    class Hurried(Gpu):
        def tell(self, which: int, event: int, *rest: int) -> int:
            if which == cu.EVENT_QUERY and self.questions == patience - 1:
                lane.cells[HURRIED] = 7
            return super().tell(which, event, *rest)

    gpu = Hurried(1 << 40)
    gpu.asked = dict.fromkeys(lane.turns[COPIED].tolist(), 0)
    lane.cells[HURRIED] = 6  # of who came before
    lane.cells[FS_OF_BYTE] = 10**15  # a second for a byte
    assert lane.issue(gpu, plan) == (0, 0)
    assert gpu.questions == patience and work(gpu) == work(unpaced(lane, plan))


def test_an_answer_that_is_an_error_is_not_waited_for() -> None:
    recorder = Recorder(answer=lambda which, *_: 700 if which == cu.EVENT_QUERY else 0)
    lane = Lane(3, True, place=1)
    assert lane.issue(recorder, PLANS["staged"]) == (0, 0)
    assert work(recorder) == work(unpaced(lane, PLANS["staged"]))


@pytest.mark.parametrize("to_host", [True, False])
def test_copies_take_their_share_of_the_link(to_host: bool) -> None:
    """From the first one on, since nobody was late."""
    lane, plan, gpu = Lane(3, to_host, place=1), PLANS["staged"], Gpu(0)
    lane.cells[FS_OF_BYTE] = 10**11  # 200 bytes take 20 ms
    assert lane.issue(gpu, plan) == (0, 0)
    firsts, seen = [], 0
    for call, at in zip(gpu.calls, gpu.at, strict=True):
        if call.name in COPIES:
            if seen in plan.chunks[:, FIRST_COPY]:
                firsts.append(at)
            seen += 1
    assert len(firsts) == len(plan.chunks) == 6
    took = np.array(firsts) - firsts[0]
    assert (took[1:] >= 0.02 * np.arange(1, 6) - 0.0005).all()
    assert took[-1] < 1, "as long as it has to, and no longer"


def test_a_pace_is_of_a_share() -> None:
    assert pace(50e9, 1) == 0 and pace(50e9, 1.0) == 0
    assert pace(50e9, 0.5) == 40_000 and pace(55e9, 0.92) == 19_763
    assert pace(1.0, 0.01) * (8 << 30) < 1 << 63, "whatever the link and the buffer"


NOW, LATE = 10**18 + 123_456_789, 3_000_000


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
def stopped(which: int, at: int) -> int:
    """A clock that stands at ``NOW``."""
    (ctypes.c_longlong * 2).from_address(at)[:] = divmod(NOW, 10**9)
    return 0


def cells_of(fs_of_byte: int, paced: bool, due: int, hurried: int) -> tuple[Int64s, Int64s, Int64s]:
    """Of a lane, scratch and an outcome."""
    lane, outcome = Lane(3, True).cells, np.zeros(OUTCOME_CELLS, np.int64)
    lane[CLOCK], lane[FS_OF_BYTE], lane[DUE] = ctypes.cast(stopped, ctypes.c_void_p).value, fs_of_byte, due
    lane[HURRIED], outcome[PACED], outcome[QUEUED] = hurried, paced, 1
    return lane, np.zeros(SCRATCH_CELLS, np.int64), outcome


def turn_of(fs_of_byte: int, paced: bool, due: int = 0, hurried: int = 0) -> int:
    """``DUE`` behind a turn of 300 bytes."""
    lane, scratch, outcome = cells_of(fs_of_byte, paced, due, hurried)
    copies, chunk = np.zeros((3, COPY_COLUMNS), np.int64), np.zeros(CHUNK_COLUMNS, np.int64)
    copies[:, COPY_BYTES], copies[:, LINES] = (7, 100, 50), (9, 2, 2)
    chunk[FIRST_COPY], chunk[N_COPIES] = 1, 2
    take_turn(lane, copies, chunk, scratch, outcome)
    return int(lane[DUE])


def test_a_turn_is_put_off_by_what_its_copies_take() -> None:
    """Of what it is late three milliseconds count."""
    assert turn_of(10**9, True) == turn_of(10**9, True, NOW - LATE) == NOW - LATE + 300_000
    for due in (NOW - LATE + 1, NOW, NOW + 10**12):
        assert turn_of(10**9, True, due) == due + 300_000


@pytest.mark.parametrize(("pause", "credit"), [(-1, True), (0, True), (LATE, True), (LATE + 1, False), (10**12, False)])
def test_who_comes_behind_a_pause_is_not_late(pause: int, credit: bool) -> None:
    due = NOW - pause
    for hurried in (0, 1):  # who is hurried changes nothing
        lane, scratch, outcome = cells_of(1, True, due, hurried)
        begin_turns(lane, scratch, outcome)
        assert lane[DUE] == (due if credit or hurried else NOW)


def test_who_is_not_paced_any_more_owes_nothing() -> None:
    """Nor leaves a debt to others."""
    assert turn_of(10**9, True, 77, hurried=1) == turn_of(10**9, False, 77) == turn_of(0, True, 77) == 77


def test_a_nap_lasts_until_the_next_turn_and_not_too_long() -> None:
    pauses: list[int] = []
    sleep = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_longlong)(lambda pause: pauses.append(pause) or 0)
    for share, due in ((0, 0), (0, 10**9), (1, -(10**9)), (1, 10**9), (1, 250_000)):
        lane, scratch, _ = cells_of(share, True, NOW + due, 0)
        lane[NAP] = ctypes.cast(sleep, ctypes.c_void_p).value
        nap(lane, scratch)
    assert pauses == [200, 200, 200, 300, 250]


def test_a_place_is_never_taken_back() -> None:
    lane = np.zeros(LANE_CELLS, np.int64)
    for place in (5, 9, 7, 0):
        hurry(lane, place)
    assert lane[HURRIED] == 9


def test_questions_leave_the_graphs_of_other_threads_alone() -> None:
    asked: list[int] = []

    def answer(which: int, *_: int) -> int:
        asked.append(which)
        return 0

    lane, recorder = Lane(3, True, place=1), Recorder(answer=answer)
    assert lane.issue(recorder, PLANS["staged"]) == (0, 0)
    each = [cu.CAPTURE_MODE, cu.EVENT_QUERY, cu.CAPTURE_MODE]
    assert asked == each * len(PLANS["staged"].chunks)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateGpu]:
    monkeypatch.setattr("kvortex.transfer.lane.PACED_S", 0)
    with fake_gpu(monkeypatch, LateGpu(1, patience=0)) as made:
        yield made


@pytest.fixture
def cache(late: LateGpu) -> PagedCache:
    return PagedCache(CudaDevice(), [Tensor(CudaDevice(), (2, 40, 5, 60)) for _ in range(3)], 1)


def engine_of(cache: PagedCache, **options: Any) -> Any:
    shape = {"num_transfer_streams": 2, "staging_buffers": 3, "gpu_pool_size_bytes": 6 * 8192}
    return cache.engine(slots=40, **{"beside_compute": True, "transfer_route": "staged", **shape, **options})


def saved(gpu: LateGpu, engine: Any, first: int, count: int) -> None:
    gpu.patience = 12
    assert engine.save_blocks(keys_of(*range(first, first + count)), np.arange(count)).wait().all()
    gpu.finish()


def waiting_load(gpu: LateGpu, cache: PagedCache, engine: Any) -> Any:
    """The ticket of a load that waits for a GPU on which nothing goes on any more. Twenty blocks are saved."""
    cache.randomize()
    saved(gpu, engine, 0, 20)
    gpu.patience = 0
    ticket = engine.load_blocks(keys_of(*range(10)), np.arange(20, 30))
    time.sleep(0.02)
    assert not ticket._transfer.completion.outcome[ISSUED]
    return ticket


@pytest.mark.parametrize("save", [True, False])
def test_a_stream_can_be_made_to_wait_for_what_is_paced(late: LateGpu, cache: PagedCache, save: bool) -> None:
    """Although nothing on the GPU goes on meanwhile; also behind another paced transfer."""
    with engine_of(cache) as engine:
        before = cache.randomize()
        saved(late, engine, 0, 20)
        late.patience = 0
        start = engine.save_blocks if save else engine.load_blocks
        keys = [keys_of(*range(first, first + 10)) for first in ((20, 30) if save else (0, 10))]
        blocks = np.arange(20, 30), np.arange(30, 40)
        tickets = [start(key, block) for key, block in zip(keys, blocks, strict=True)]
        outcomes = [ticket._transfer.completion.outcome for ticket in tickets]
        time.sleep(0.02)
        assert not outcomes[0][ISSUED] and not outcomes[1][ISSUED], "they wait for what does not come"
        tickets[1].add_to(0x77)
        assert outcomes[0][ISSUED] and outcomes[1][ISSUED]
        late.patience = 12
        assert all(ticket.wait().all() for ticket in tickets)
        late.finish()
        if not save:
            assert_same(cache.memory(), cache.expected(before, before, [(at, at + 20) for at in range(20)]))


def test_what_is_not_paced_does_not_wait_for_what_is(late: LateGpu, cache: PagedCache) -> None:
    with engine_of(cache) as engine:
        long = waiting_load(late, cache, engine)
        engine._executor.beside_compute = False
        short = engine.load_blocks(keys_of(11), [31])
        assert poll(lambda: bool(short._transfer.completion.outcome[ISSUED]), time.monotonic() + 10)
        assert long._transfer.completion.outcome[ISSUED]
        late.patience = 12
        assert long.wait().all() and short.wait().all()


def test_the_option_reaches_both_directions(late: LateGpu, cache: PagedCache) -> None:
    for share, wanted in ((0.25, (0.25, 0.25)), (1.0, (1, 1)), (None, (0.92, 0.92)), ((0.5, 0.75), (0.5, 0.75))):
        options = {} if share is None else {"link_share_beside_compute": share}
        with engine_of(cache, **options) as engine:
            lanes, rate = engine._executor._lanes, engine._executor._profile.link_rate
            for direction, own in zip((Direction.SAVE, Direction.LOAD), wanted, strict=True):
                assert lanes[direction].cells[FS_OF_BYTE] == pace(rate, own)
                assert (pace(rate, own) > 0) == (own != 1)


PACED_CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "staged": ({}, {}, True),
    "layer by layer": ({}, {"layerwise": True}, True),
    "nothing computes": ({"beside_compute": False}, {}, False),
    "layer by layer, nothing computes": ({"beside_compute": False}, {"layerwise": True}, False),
    "batched": ({"transfer_route": "batched"}, {}, False),
    "resident": ({"transfer_route": "resident"}, {}, False),
    "strided": ({"transfer_route": "strided"}, {}, False),
    "one buffer": ({"staging_buffers": 1, "num_transfer_streams": 1}, {}, False),
}


@pytest.mark.parametrize("case", PACED_CASES)
def test_what_is_paced(late: LateGpu, cache: PagedCache, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.transfer.lane.PACED_S", 1e-12)
    options, how, paced = PACED_CASES[case]
    late.patience = 12
    with engine_of(cache, **options) as engine:
        save = engine.save_blocks(keys_of(*range(20)), np.arange(20), **how)
        for layer in range(3 if how else 0):
            save.save_layer(layer)
        completion = save._transfer.completion
        parts = completion._parts if how else [completion]
        assert [bool(part.outcome[PACED]) for part in parts] == [paced] * len(parts)
        assert save.wait().all()


@pytest.mark.parametrize("staging", [6 * 8192, 60 * 8192])
def test_what_is_too_short_for_naps_is_not_paced(
    late: LateGpu, cache: PagedCache, staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan, or what the other buffers hold."""
    late.patience = 12
    with engine_of(cache, gpu_pool_size_bytes=staging) as engine:
        lane = engine._executor._lanes[Direction.SAVE]
        least = min(10 * cache.layout.record_bytes, lane._ahead_bytes)
        assert least < max(10 * cache.layout.record_bytes, lane._ahead_bytes)
        for most, paced in ((least, True), (least + 1, False)):
            monkeypatch.setattr("kvortex.transfer.lane.PACED_S", (most - 0.5) / engine._executor._profile.link_rate)
            save = engine.save_blocks(keys_of(*range(100 * most, 100 * most + 10)), np.arange(10))
            assert bool(save._transfer.completion.outcome[PACED]) is paced
            assert save.wait().all()


def test_coded_blocks_are_paced(late: LateGpu, tmp_path: Path) -> None:
    late.patience = 12
    coded_pages = Coded.make(tmp_path, device=CudaDevice())
    options = {"beside_compute": True, "num_transfer_streams": 2, "staging_buffers": 3}
    with coded_pages.engine("int8", slots=40, **options) as engine:
        for layerwise in (False, True):
            save = engine.save_blocks(keys_of(7 + layerwise), [0], layerwise=layerwise, first=False)
            for layer in range(3 if layerwise else 0):
                save.save_layer(layer)
            completion = save._transfer.completion
            assert all(part.outcome[PACED] for part in (completion._parts if layerwise else [completion]))
            save.wait()


def test_an_engine_that_ends_holds_nothing_back(late: LateGpu, cache: PagedCache) -> None:
    late.patience = 12
    engine = engine_of(cache, link_share_beside_compute=0.5)
    for lane in engine._executor._lanes.values():
        lane.cells[FS_OF_BYTE] = 10**14  # ten seconds for a block
    ticket = engine.save_blocks(keys_of(*range(20)), np.arange(20))
    began = time.monotonic()
    engine.shutdown()
    assert ticket.done() and time.monotonic() - began < 10


def test_a_full_queue_is_not_paced(late: LateGpu, cache: PagedCache) -> None:
    with engine_of(cache) as engine:
        waiting = waiting_load(late, cache, engine)
        lane = engine._executor._lanes[Direction.LOAD]
        counts = lane._submitter._counts
        counts[0] = counts[1] + len(lane._submitter._rows)  # as if so many were behind it: none of them has a row
        assert not lane._submitter._leave(STREAMED, _STREAMED_LIKE, _STREAMED_LIKE)
        assert poll(lambda: bool(waiting._transfer.completion.outcome[ISSUED]), time.monotonic() + 10)
        counts[0] = counts[1]
        late.patience = 12
        assert waiting.wait().all()
