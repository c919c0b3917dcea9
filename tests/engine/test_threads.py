"""Eight threads, a pool far too small, and every byte checked: nothing wrong, nothing leaked, no deadlock."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from kvortex.devices import Device
from kvortex.errors import PoolFullError
from tests.pages import PagedCache, Tensor, keys_of

THREADS, CALLS, NUMBERS, PAGES = 8, 3_000, 200, 4
SWITCH_S = 5e-5  # Python's own is a hundred times as long: threads come between each other's lines that much more often


def pattern(number: int, tensor: int, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes that only this block of this tensor has."""
    seed = (number * 7 + tensor) * 2654435761 % 2**32
    words = (np.arange(int(np.prod(shape)), dtype=np.uint64) * 0x9E3779B97F4A7C15 + seed) >> np.uint64(40)
    return (words & np.uint64(255)).astype(np.uint8).reshape(shape)


def run(cache: PagedCache, calls: int, slots: int) -> None:
    wanted = [[pattern(n, t, (2, 8, 8, 2)) for n in range(NUMBERS)] for t in range(len(cache.tensors))]
    errors: list[str] = []
    counts = {"full": 0, "hit": 0, "miss": 0, "wrong": 0}
    guard = threading.Lock()

    def write(page: int, number: int) -> None:
        for at, tensor in enumerate(cache.tensors):
            tensor.buffer.write(wanted[at][number], page * tensor.strides[0])

    def wrong(page: int, number: int) -> int:
        bad = 0
        for at, tensor in enumerate(cache.tensors):
            expected = wanted[at][number].reshape(-1)
            bad += int((tensor.buffer.read(page * tensor.strides[0], expected.size) != expected).sum())
        return bad

    def work(me: int) -> None:
        rng = np.random.default_rng(me)
        mine = np.arange(me * PAGES, (me + 1) * PAGES)
        tally = dict.fromkeys(counts, 0)
        try:
            for _ in range(calls):
                numbers = rng.choice(NUMBERS, int(rng.integers(1, PAGES + 1)), replace=False)
                pages = rng.permutation(mine)[: len(numbers)]
                keys = keys_of(*numbers)
                kind = rng.integers(3)
                if kind == 0:
                    for page, number in zip(pages.tolist(), numbers.tolist(), strict=True):
                        write(page, number)
                    try:
                        ticket = engine.save_blocks(keys, pages, layerwise=bool(rng.integers(2)))
                        for layer in ticket.missing_layers:
                            ticket.save_layer(layer)
                        ticket.wait()
                    except PoolFullError:
                        tally["full"] += 1
                elif kind == 1:
                    mask = engine.load_blocks(keys, pages).wait()
                    for page, number, hit in zip(pages.tolist(), numbers.tolist(), mask.tolist(), strict=True):
                        tally["hit" if hit else "miss"] += 1
                        if hit:
                            tally["wrong"] += wrong(page, number)
                else:
                    engine.check_blocks(keys)
        except BaseException as error:
            errors.append(repr(error))
            raise
        finally:
            with guard:
                for name, value in tally.items():
                    counts[name] += value

    with cache.engine(slots=slots) as engine:
        engine.save_blocks(keys_of(0), [0]).wait()
        threads = [threading.Thread(target=work, args=(me,), daemon=True) for me in range(THREADS)]
        deadline = time.monotonic() + 240
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in threads), "deadlock"
        assert not errors, errors[0]
        stats = engine.get_stats()
        engine._index.check()
    assert counts["wrong"] == 0, counts
    assert min(counts["hit"], counts["miss"]) > calls and stats.evictions > calls, (counts, stats)
    assert (stats.reserved_blocks, stats.pinned_blocks, stats.failed_blocks) == (0, 0, 0)


@pytest.fixture(autouse=True)
def _many_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    yield
    sys.setswitchinterval(before)


def make(device: Device) -> PagedCache:
    return PagedCache(device, [Tensor(device, (THREADS * PAGES, 2, 8, 8)) for _ in range(2)], 0)


@pytest.mark.slow
def test_eight_threads_on_a_small_pool(device: Device) -> None:
    run(make(device), CALLS, slots=40)


def test_wrong_bytes_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above must be able to fail: several slots share their bytes."""
    from kvortex.devices import HostDevice
    from kvortex.transfer.host import HostExecutor

    submit = HostExecutor.prepare_blocks
    monkeypatch.setattr(
        HostExecutor, "prepare_blocks", lambda self, d, b, slots, *others: submit(self, d, b, slots % 7, *others)
    )
    cache = make(HostDevice())
    with pytest.raises(AssertionError, match="wrong"):
        run(cache, 200, slots=40)
