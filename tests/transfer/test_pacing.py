"""What a thread issues beside a computing model: kernels when they can begin, and copies at the pace of a share of the link."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvortex.devices import driver as cu
from kvortex.devices.asking import NOT_READY
from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.cells import COPIED, FS_OF_BYTE, HURRIED, ISSUED
from kvortex.transfer.pacing import pace
from kvortex.transfer.plan import FIRST_COPY, N_COPIES, Plan
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
            assert copied[stream] not in passed or name == "one chunk" and streams == 1


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
    """Of what they are late 3 ms are made up for, and no more."""
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
    assert (took[1:] >= 0.02 * np.arange(1, 6) - 0.0035).all()
    assert took[-1] < 1, "as long as it has to, and no longer"


def test_a_pace_is_of_a_share() -> None:
    assert pace(50e9, 1) == 0 and pace(50e9, 1.0) == 0
    assert pace(50e9, 0.5) == 40_000 and pace(55e9, 0.92) == 19_763


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateGpu]:
    monkeypatch.setattr("kvortex.transfer.lane.PACED_BYTES", 0)
    with fake_gpu(monkeypatch, LateGpu(1, patience=0)) as made:
        yield made


def engine_of(cache: PagedCache, **options: Any) -> Any:
    options = {"beside_compute": True, "transfer_route": "staged", "gpu_pool_size_bytes": 6 * 8192} | options
    return cache.engine(slots=40, num_transfer_streams=2, staging_buffers=3, **options)


def saved(gpu: LateGpu, engine: Any, first: int, count: int) -> None:
    gpu.patience = 12
    assert engine.save_blocks(keys_of(*range(first, first + count)), np.arange(count)).wait().all()
    gpu.finish()


@pytest.mark.parametrize("save", [True, False])
def test_a_stream_can_be_made_to_wait_for_what_is_paced(late: LateGpu, save: bool) -> None:
    """Although nothing on the GPU goes on meanwhile; also behind another paced transfer."""
    cache = PagedCache(CudaDevice(), [Tensor(CudaDevice(), (2, 40, 5, 60)) for _ in range(3)], 1)
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


def test_what_is_not_paced_does_not_wait_for_what_is(late: LateGpu) -> None:
    cache = PagedCache(CudaDevice(), [Tensor(CudaDevice(), (2, 40, 5, 60)) for _ in range(3)], 1)
    with engine_of(cache) as engine:
        cache.randomize()
        saved(late, engine, 0, 20)
        late.patience = 0
        long = engine.load_blocks(keys_of(*range(10)), np.arange(20, 30))
        time.sleep(0.02)
        assert not long._transfer.completion.outcome[ISSUED]
        engine._executor.beside_compute = False
        short = engine.load_blocks(keys_of(11), [31])
        deadline = time.monotonic() + 10
        while not short._transfer.completion.outcome[ISSUED] and time.monotonic() < deadline:
            time.sleep(1e-3)
        assert short._transfer.completion.outcome[ISSUED] and long._transfer.completion.outcome[ISSUED]
        late.patience = 12
        assert long.wait().all() and short.wait().all()
