"""Blocks of which DMAs bring a part and a kernel the rest: where they are cut, and what is issued on which stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvortex.transfer.plan import (
    FIRST_BLOCK,
    FIRST_COPY,
    FIRST_PIECE,
    LINES,
    LINES_OF_RUN,
    N_BLOCKS,
    N_COPIES,
    N_PIECES,
    Int64s,
    Pool,
    split_pieces,
    strides,
)
from kvortex.transfer.split import Cut, cut_record, plan_split
from tests.fake_gpu import fake_gpu
from tests.pages import PagedCache, Tensor, keys_of
from tests.transfer.issuing import CALLER, CALLER_EVENT, DONE, JOIN_STREAM, PLANS, Lane
from tests.transfer.plans import fragments_of
from tests.transfer.profiles import shape
from tests.transfer.recorder import Call, Recorder, predecessors
from tests.transfer.test_issue import PINNED, READER, SUMS, WORK, copies_of_sums, digest_of

CODE = 719


def cut_of(sizes: list[int], allocations: list[int] | None = None) -> tuple[Cut, Int64s]:
    fragments, _ = fragments_of(sizes, 10, 0, interleaved=False)
    where = np.zeros(len(sizes), np.int64) if allocations is None else np.array(allocations)
    pieces = split_pieces(fragments, 16)
    return cut_record(fragments, strides(fragments, 1 << 31, where), pieces), pieces


@pytest.mark.parametrize(
    ("count", "lines", "balanced"),
    [(64, 28, True), (2, 1, True), (4, 2, True), (5, 2, True), (7, 3, True), (16, 7, True), (3, 1, False), (1, 0, False)],
)
def test_a_little_less_than_half_of_the_lines_are_copied(count: int, lines: int, balanced: bool) -> None:
    """Whole lines, as near to 7/16 as can be; too much for either way is no split that is worth it."""
    cut, pieces = cut_of([64] * count)
    assert (cut.nbytes, cut.n_pieces, cut.balanced) == (64 * lines, 4 * lines, balanced)
    assert cut.copies[:, LINES].tolist() == [lines] * (lines > 0) and len(pieces) == 4 * count


def test_lengths_count_and_not_numbers_of_lines() -> None:
    assert cut_of([448, 64, 512])[0].nbytes == 448 and cut_of([1000, 10, 10])[0].nbytes == 0
    cut, pieces = cut_of([100, 350, 574])
    assert cut.nbytes == 450 and cut.balanced and cut.n_pieces == 7 + 22 and pieces[29, 2] == 450
    assert not cut_of([100, 200, 900])[0].balanced


def test_the_run_with_the_cut_in_it_is_shortened_and_those_behind_are_left_out() -> None:
    cut, _ = cut_of([64] * 16, [1] * 4 + [2] * 12)
    assert cut.copies[:, LINES].tolist() == [4, 3] and cut.rectangle_bytes == 64 * 7 // 2
    cut, _ = cut_of([64] * 16, [1] * 7 + [2] * 9)
    assert cut.copies[:, LINES].tolist() == [7], "where one run ends, no more and no empty one"
    fragments, _ = fragments_of([64] * 16, 10, 0, interleaved=False)
    runs = strides(fragments, 1 << 31, np.zeros(16, np.int64))
    cut_record(fragments, runs, split_pieces(fragments))
    assert runs[:, LINES_OF_RUN].tolist() == [16], "which others use as they are"


def test_copies_and_launches_take_turns_over_the_same_records() -> None:
    chunks = PLANS["split"].chunks
    assert chunks[::2, N_PIECES].tolist() == [0] * 3 and chunks[1::2, N_COPIES].tolist() == [0] * 3
    assert (chunks[::2, N_COPIES] == chunks[1::2, N_BLOCKS]).all() and chunks[1::2, N_BLOCKS].sum() == 9
    assert set(chunks[1::2, FIRST_PIECE].tolist()) == {4} and set(chunks[1::2, N_PIECES].tolist()) == {4}


@pytest.mark.parametrize("fragments", [4, 9])
def test_one_block_is_planned_as_each_of_many(fragments: int) -> None:
    table, _ = fragments_of([25] * fragments, 100, 0, interleaved=False)
    pieces, pool = split_pieces(table, 16), Pool(0x77000, 4096, 5)
    cut = cut_record(table, strides(table, 1 << 31, np.zeros(fragments, np.int64)), pieces)
    blocks, slots = np.array([8, 3, 5]), np.array([2, 6, 11])
    many, each = plan_split(blocks, slots, pieces, cut, pool, 64), len(cut.copies)
    for at in range(3):
        one = plan_split(blocks[at : at + 1], slots[at : at + 1], pieces, cut, pool, 64)
        wanted = many.chunks[2 * at : 2 * at + 2].copy()
        wanted[0, FIRST_COPY] = wanted[1, FIRST_BLOCK] = 0
        np.testing.assert_array_equal(one.chunks, wanted)
        np.testing.assert_array_equal(one.copies, many.copies[each * at : each * (at + 1)])
        assert one.ids.tolist() == [blocks[at]] and one.ids.dtype == many.ids.dtype and not len(one.order)
        assert (one.nbytes, one.pitch, one.ctas) == (many.nbytes // 3, many.pitch, many.ctas)


@pytest.mark.parametrize("apart", [0, 8])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize("name", ["split", "one split"])
def test_what_is_read_is_what_was_copied(name: str, to_host: bool, count: int, turn: int, apart: int) -> None:
    """Of a load behind all its copies, and beside its kernels; of a save beside all. Kernels and reader add up to sums that
    are zeros by then, and only then are read back."""
    lane, plan = Lane(count, to_host, turn % count, digest=digest_of(reads=True, apart=apart)), PLANS[name]
    recorder = Recorder()
    assert lane.issue(recorder, plan) == (0, 0)
    calls, before = recorder.calls, predecessors(recorder.calls)
    launches = [at for at, call in enumerate(calls) if call.name == "launch"]
    (read,) = (at for at in launches if calls[at].arguments[0] == READER)
    kernels, sums = [at for at in launches if at != read], copies_of_sums(calls)
    copies = [at for at, call in enumerate(calls) if call.name in WORK and at not in (*launches, *sums)]
    done = next(at for at, call in enumerate(calls) if call.name == "record" and call.arguments[0] == DONE)
    assert len(copies) == len(plan.copies) and len(kernels) == len(plan.chunks) // 2
    assert {read, *kernels, *copies, *sums} <= before[done]
    assert all(calls.index(Call("record", (CALLER_EVENT, CALLER))) in before[at] for at in (read, *kernels, *copies))
    assert to_host or set(copies) <= before[read]
    if count == 2:
        assert min(copies) < min(kernels) < read, "both ways are busy before anything is asked for that they do not wait for"
        assert not any(before[at] & {*copies, read} for at in kernels), "kernels wait for no copy, and not to be read"
        assert not before[read] & set(kernels) and not any(before[at] & set(kernels) for at in copies)
        assert {calls[at].stream for at in copies} == {int(lane.streams[turn])} != {calls[at].stream for at in kernels}
        assert to_host or calls[read].stream == int(lane.streams[turn])
        meets = {call.stream for call in calls if call.name not in ("push", "pop")}
        assert (JOIN_STREAM in meets) == (not to_host and not apart), "but where sums come back, which copy the other way"
    for at, chunk in zip(kernels, plan.chunks[1::2].tolist(), strict=True):
        first = SUMS + 16 * (apart * chunk[FIRST_BLOCK] + chunk[FIRST_PIECE] if apart else chunk[FIRST_BLOCK])
        assert calls[at].parameters[9] == first
    if not apart:
        sent, back = sums
        assert all(sent in before[at] and at in before[back] for at in (read, *kernels)) and back in before[done]
        assert calls[back].arguments[:2] == (PINNED, SUMS)
        assert to_host or calls[back].stream == JOIN_STREAM


CASES = [(name, to_host, apart) for name in ("split", "one split") for to_host in (True, False) for apart in (0, 8, None)]


@pytest.mark.parametrize(("name", "to_host", "apart"), CASES)
def test_a_driver_that_refuses_any_call(name: str, to_host: bool, apart: int | None) -> None:
    """No work behind a refusal, and ``done`` behind all work before it, or the code that says that it is not."""

    def issued(fails: dict[int, int]) -> tuple[tuple[int, int], Recorder]:
        digest, recorder = None if apart is None else digest_of(reads=True, apart=apart), Recorder(fails)
        return Lane(2, to_host, 1, digest=digest).issue(recorder, PLANS[name]), recorder

    total = len(issued({})[1].calls)
    for at in range(1, total):
        (first, last), recorder = issued({at: CODE})
        calls, failed = recorder.calls, recorder.calls[at]
        assert recorder.names[-1] == "pop" and recorder.names.count("pop") == 1
        if failed.name == "pop":
            assert (first, last) == (0, 0)
            continue
        assert CODE in (first, last), "a refusal that nobody hears of"
        assert not any(call.name in WORK for call in calls[at + 1 :]) or not first
        dones = [k for k, call in enumerate(calls) if call.name == "record" and call.arguments[0] == DONE]
        assert len(dones) == 1
        if not last:
            work = {k for k, call in enumerate(calls) if call.name in WORK and k != at}
            assert work <= predecessors(calls, {at: CODE})[dones[0]]


@pytest.mark.parametrize("streams", [1, 3])
def test_copies_and_kernels_are_on_two_streams_however_many_others_have(streams: int, monkeypatch: Any) -> None:
    with fake_gpu(monkeypatch) as gpu:
        from kvortex.devices.cuda import CudaDevice

        device = CudaDevice()
        cache = PagedCache(device, [Tensor(device, (16, 12, 4, 256))], 1)
        with cache.engine(slots=10, num_transfer_streams=streams, transfer_route="split") as engine:
            before = cache.randomize()
            assert engine.save_blocks(keys_of(*range(5)), np.array([3, 1, 4, 0, 5])).wait().all()
            for blocks, keys in ((np.array([7]), [2]), (np.array([8, 6, 9]), [4, 0, 3])):
                gpu.issued.calls.clear()
                poisoned = cache.randomize()
                assert engine.load_blocks(keys_of(*keys), blocks).wait().all()
                moves = list(zip([[3, 1, 4, 0, 5][key] for key in keys], blocks.tolist(), strict=True))
                for found, wanted in zip(cache.memory(), cache.expected(poisoned, before, moves), strict=True):
                    np.testing.assert_array_equal(found, wanted)
                calls = [call for call in gpu.issued.calls if call.name in ("lines", "launch")]
                lines = [call for call in calls if call.name == "lines"]
                assert len(lines) == len(keys) and {call.parameters[15] for call in lines} == {7}, "of 16 lines"
                *kernels, read = (call for call in calls if call.name == "launch")
                assert {call.stream for call in lines} == {read.stream}
                assert {call.stream for call in kernels}.isdisjoint({read.stream}) and kernels
                assert read.parameters[1] == 7 and read.parameters[3] == len(keys), "a piece a line, of seven of them"
                assert not any(call.name in ("to_host", "to_device") for call in gpu.issued.calls)


@pytest.mark.parametrize(
    ("fragments", "copy_bytes", "able"), [(16, 14 << 10, True), (16, (14 << 10) + 1, False), (3, 1, False), (1, 1, False)]
)
def test_when_an_executor_may_take_the_route(fragments: int, copy_bytes: int, able: bool, monkeypatch: Any) -> None:
    """Rectangles are long enough, seven lines of 2 KiB here, and neither part is much longer than the other."""
    shape(monkeypatch, copy_bytes=copy_bytes)
    with fake_gpu(monkeypatch):
        from kvortex.devices.cuda import CudaDevice

        cache = PagedCache(CudaDevice(), [Tensor(CudaDevice(), (fragments, 12, 4, 256))], 1)
        with cache.engine(slots=10) as engine:
            executor: Any = engine._executor
            assert executor._ability().split is able
