"""Everything an engine takes is given back: by shutdown, by ``with``, when it is dropped; and a fork does no harm."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvortex import KVortexEngine
from kvortex import parts as parts_module
from kvortex.devices import Device, HostDevice
from kvortex.errors import EngineClosedError, PoolFullError, TransferTimeoutError
from kvortex.memory.arena import PinnedArena
from tests.engine.test_endings import alone
from tests.pages import PagedCache, assert_same, keys_of


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_vram(device: Device) -> int:
    if isinstance(device, HostDevice):
        return 0
    from kvortex.devices import driver as cu

    with cu.current(device.context) as driver:  # type: ignore[attr-defined]
        return int(cu.check(driver.cuMemGetInfo(), "cuMemGetInfo")[0])


def assert_no_vram_stays(device: Device, use: Callable[[], object]) -> None:
    """What is used again and again leaves the GPU as much memory as before. Other processes take theirs and give it back
    meanwhile, so one look is not enough: what stays taken is missing at each."""
    for _ in range(10):
        before = free_vram(device)
        use()
        if before - free_vram(device) < 4 << 20:
            return
    raise AssertionError("VRAM is missing behind each of ten uses")


def use(engine: KVortexEngine) -> None:
    assert engine.save_blocks(keys_of(1, 2), [1, 2]).wait().all()
    assert engine.load_blocks(keys_of(1, 2), [3, 4]).wait().all()


@pytest.mark.parametrize("how", ["shutdown", "with", "drop", "cycle"])
def test_nothing_stays_taken(device: Device, how: str) -> None:
    cache = PagedCache.plain(device)
    pool = 64 << 20

    def once() -> None:
        engine = cache.engine(cpu_pool_size_bytes=pool)
        use(engine)
        if how == "shutdown":
            engine.shutdown()
        elif how == "with":
            with engine:
                pass
        elif how == "cycle":
            engine.myself = engine  # type: ignore[attr-defined]
            del engine
            gc.collect()

    once()  # compiles, and fills the allocators' own pools
    once()
    threads, memory = threading.active_count(), resident_bytes()
    assert_no_vram_stays(device, lambda: [once() for _ in range(5)])
    assert threading.active_count() <= threads
    assert resident_bytes() - memory < pool // 2


def test_shutdown_while_others_call(device: Device) -> None:
    cache = PagedCache.plain(device)
    engine = cache.engine()
    use(engine)
    ended: list[str] = []

    def work() -> None:
        rng = np.random.default_rng(threading.get_ident() % 2**32)
        try:
            while True:
                with contextlib.suppress(PoolFullError):  # nobody waits, so all slots may be under way
                    engine.save_blocks(keys_of(int(rng.integers(100))), [int(rng.integers(24))])
                engine.check_blocks(keys_of(1))
        except EngineClosedError:
            ended.append("closed")

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    engine.shutdown()
    for worker in workers:
        worker.join(20)
    assert ended == ["closed"] * 4


@pytest.mark.parametrize("drop", [True, False])
def test_a_fork_does_no_harm(device: Device, drop: bool) -> None:
    """The child may try to use, close or drop its copy; the parent's engine goes on."""
    cache = PagedCache.plain(device)
    engine = cache.engine()
    before = cache.randomize()
    engine.save_blocks(keys_of(1), [1]).wait()
    ticket = engine.save_blocks(keys_of(2), [2])
    if drop:
        ticket.wait()  # else the child's copy would wait for it before it freed anything
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which the child does not use
        child = os.fork()
    if child == 0:
        code = 1
        try:
            calls = [lambda: engine.check_blocks(keys_of(1)), lambda: engine.save_blocks(keys_of(5), [5])]
            if not drop:  # a ticket that the parent had not settled
                calls += [ticket.done, ticket.wait, lambda: ticket.mask, lambda: ticket.add_to(None)]
            for call in calls:
                try:
                    call()
                except EngineClosedError as error:
                    assert re.search("forked", str(error))
                else:
                    raise AssertionError("a forked child used the engine")
            PinnedArena.close = lambda self: os._exit(7)  # type: ignore[method-assign]
            if not drop:
                engine.shutdown()
                engine.shutdown()
            del engine, ticket
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert ticket.wait().all()
    poisoned = cache.randomize()
    assert engine.load_blocks(keys_of(1, 2), [10, 11]).wait().all()
    assert_same(cache.memory(), cache.expected(poisoned, before, [(1, 10), (2, 11)]))
    engine.shutdown()


def test_a_failed_start_gives_back_what_it_took(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache.plain(device)
    closed: list[object] = []

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("planted")

    if isinstance(device, HostDevice):
        from kvortex.transfer.host import HostExecutor as Executor
    else:
        from kvortex.transfer.cuda import CudaExecutor as Executor

    def watch(kind: Any) -> None:
        close = kind.close
        monkeypatch.setattr(kind, "close", lambda self: (closed.append(kind), close(self)))

    watch(PinnedArena)
    watch(Executor)
    monkeypatch.setattr("kvortex.parts.BlockIndex", fail)

    def start() -> None:
        closed.clear()
        with pytest.raises(MemoryError, match="planted"):
            cache.engine()
        assert closed == [Executor, PinnedArena], "both, and the executor first: it uses the arena's memory"
        gc.collect()

    assert_no_vram_stays(device, start)


def test_memory_is_kept_while_a_thread_of_the_engine_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, closed = PagedCache.plain(HostDevice()), []
    engine = cache.engine()
    parts = engine._parts

    def stuck() -> None:
        raise TransferTimeoutError("planted")

    monkeypatch.setattr(parts.executor, "close", stuck)
    monkeypatch.setattr(parts.arena, "close", lambda: closed.append(1))
    with pytest.raises(TransferTimeoutError, match="planted"):
        engine.shutdown()
    assert not closed and parts in parts_module._KEPT
    monkeypatch.undo()
    parts_module._KEPT.remove(parts)
    parts.dispose(0.0)


def test_an_engine_that_fails_at_its_last_step_gives_everything_back(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PagedCache.plain(device)
    closed: list[PinnedArena] = []
    close = PinnedArena.close

    class Unready:
        """What the engine asks for its namespace when all else is there."""

        @property
        def namespace(self) -> None:
            raise MemoryError("planted")

    monkeypatch.setattr(PinnedArena, "close", lambda arena: (closed.append(arena), close(arena)))
    monkeypatch.setattr("kvortex.engine.make_scheme", lambda *_, **__: Unready())
    with pytest.raises(MemoryError, match="planted") as caught:  # keeps the frames, and the half-made engine in one
        cache.engine()
    assert closed and caught.tb, "by now, and not whenever the collector comes"


def test_nothing_is_compiled_in_the_middle_of_a_call() -> None:
    """In a process of its own, since here everything has been called before."""
    code = """
        from numba.core.dispatcher import Dispatcher
        from kvortex.index import _reads, core
        from kvortex.keys import VllmKeys, _cbor, _loops
        from kvortex.transfer import copies

        def loaded():
            rooms = [core, _reads, copies, _cbor, _loops]
            rooms = {f"{room.__name__}.{name}": f for room in rooms for name, f in vars(room).items()}
            return {name: len(f.signatures) for name, f in rooms.items() if isinstance(f, Dispatcher)}

        gate.set()
        with cache.engine() as engine:
            before = loaded()
            assert engine.save_blocks(keys_of(1, 2), [1, 2]).wait().all()
            for layerwise in (False, True):
                engine.load_blocks(keys_of(1, 9), [3, 4], layerwise=layerwise).wait()
            ticket = engine.save_blocks(keys_of(5, 6), [5, 6], layerwise=True)
            for layer in ticket.missing_layers:
                ticket.save_layer(layer)
            assert ticket.wait().all()
            engine.check_blocks(keys_of(1))
            engine.get_stats()
            keys = engine.block_keys(range(40))
            engine.block_keys([1] * 16, keys[1], lora="l", salt="s")
            engine.key_sequence().extend(range(40))
            scheme = VllmKeys(engine.namespace, "vllm-0.15", seed="0")
            scheme.stored(scheme.block_keys(range(40), salt="s", lora="l"))
            scheme.block_keys(range(16), keys[1], start=16, multimodal=[("a", 3, 20)])
            scheme.block_keys(range(16), prompt_embeds=np.ones((3, 20)).T)
            print(loaded() == before, sum(before.values()) > 5)
    """
    assert alone(code).split() == ["True", "True"]
