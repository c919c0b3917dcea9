"""Engines that are dropped, forked or left behind while transfers run, and threads that call at awkward moments.

What would crash the process runs in one of its own.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kvortex.devices import HostDevice, HostStream
from kvortex.errors import ArgumentError, EngineClosedError, ReentrantCallError, TransferTimeoutError
from tests.pages import PagedCache, keys_of

ROOT = Path(__file__).parents[2]
START = """
import gc, os, threading, time
import conftest
import numpy as np
from kvortex.devices import HostDevice, HostStream
from tests.pages import PagedCache, keys_of
cache = PagedCache.plain(HostDevice())
gate, stream = threading.Event(), HostStream()
stream.enqueue(gate.wait)
"""


def alone(code: str) -> str:
    """What a fresh process prints; it must end well, and soon."""
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_memory_of_a_dropped_engine_outlives_a_transfer_that_does_not_end_in_time() -> None:
    said = alone("""
        engine = cache.engine(transfer_timeout_s=0.05)
        address = engine._parts.arena.address
        engine.save_blocks(keys_of(1), [1], stream=stream)
        del engine
        time.sleep(0.3)
        gc.collect()
        from tests.memory.smaps import is_mapped
        print(is_mapped(address))
        gate.set()
        stream.synchronize()
        time.sleep(0.1)
    """)
    assert said.split() == ["True"]


def test_a_child_that_drops_its_copy_loses_no_memory_of_its_own() -> None:
    said = alone("""
        import warnings
        warnings.simplefilter("ignore")
        engine = cache.engine()
        child = os.fork()
        if child == 0:
            mine = [np.ones(n << 10) for n in (1, 64, 512, 1024, 4096)]
            del engine
            gc.collect()
            os._exit(0 if all(array.sum() == len(array) for array in mine) else 1)
        print(os.waitpid(child, 0)[1])
        print(engine.save_blocks(keys_of(1), [1]).wait())
    """)
    assert said.split() == ["0", "[", "True]"]


def test_the_interpreter_ends_soon_with_a_transfer_behind_a_stream() -> None:
    began = time.monotonic()
    alone("""
        engine = cache.engine(transfer_timeout_s=50.0)
        engine.save_blocks(keys_of(1), [1], stream=stream)
        threading.Timer(0.1, gate.set).start()
    """)
    assert time.monotonic() - began < 25


def test_an_engine_that_is_collected_in_a_thread_that_copies() -> None:
    cache = PagedCache.plain(HostDevice())
    engine = cache.engine(transfer_timeout_s=20.0)
    holder, ended = [engine], threading.Event()
    stream = HostStream()
    ticket = engine.save_blocks(keys_of(1), [1], stream=stream)
    parts = engine._parts
    del engine, ticket
    parts.executor._work.put(lambda: (holder.clear(), ended.set()))
    assert ended.wait(5), "the collector waited in the thread for which it waits"
    stream.close()


def test_saves_that_overlap_cost_what_they_hold() -> None:
    """Chunked prefill saves all keys so far at each step; settling used to ask every save for each block of every other."""
    cache = PagedCache.plain(HostDevice(), blocks=600)
    gate, stream = threading.Event(), HostStream()
    stream.enqueue(gate.wait)
    with cache.engine(cpu_pool_size_bytes=600 * 16384) as engine:
        tickets = []
        for step in range(1, 7):
            n = 64 * step
            tickets.append(engine.save_blocks(keys_of(*range(n)), np.arange(n), stream=stream))
        began = time.monotonic()
        for _ in range(20):
            assert not engine.check_blocks(keys_of(1)).any()
        assert time.monotonic() - began < 5
        gate.set()
        assert all(ticket.wait().all() for ticket in tickets)
    stream.close()


def test_a_long_row_of_saves_that_wait_for_each_other() -> None:
    cache = PagedCache.plain(HostDevice())
    gate, stream = threading.Event(), HostStream()
    stream.enqueue(gate.wait)
    with cache.engine(cpu_pool_size_bytes=1500 * 16384) as engine:
        tickets = [engine.save_blocks(keys_of(n, n + 1), [0, 1], stream=stream) for n in range(1200)]
        assert not engine.check_blocks(keys_of(1)).any()
        gate.set()
        assert all(ticket.wait().all() for ticket in tickets)
    stream.close()


def test_others_are_refused_at_once_while_a_shutdown_waits() -> None:
    cache = PagedCache.plain(HostDevice())
    gate, stream = threading.Event(), HostStream()
    stream.enqueue(gate.wait)
    engine = cache.engine()
    ticket = engine.save_blocks(keys_of(1), [1], stream=stream)
    closing = threading.Thread(target=lambda: pytest.raises(TransferTimeoutError, engine.shutdown, 2.0))
    closing.start()
    time.sleep(0.1)
    began = time.monotonic()
    with pytest.raises(EngineClosedError):
        engine.check_blocks(keys_of(1))
    with pytest.raises(TransferTimeoutError):
        engine.shutdown(0.05)
    assert time.monotonic() - began < 1.8 and not ticket.done()
    closing.join()
    gate.set()
    engine.shutdown()
    assert ticket.done() and ticket.mask.all()
    stream.close()


def test_a_shutdown_inside_a_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a signal handler: it would wait for itself."""
    cache = PagedCache.plain(HostDevice())
    with cache.engine() as engine:
        lookup = engine._index.lookup

        def interrupted(keys: object) -> object:
            with pytest.raises(ReentrantCallError):
                engine.shutdown()
            return lookup(keys)

        monkeypatch.setattr(engine._index, "lookup", interrupted)
        assert not engine.check_blocks(keys_of(1)).any()


def test_a_stream_whose_work_raised_fails_what_waits_for_it() -> None:
    cache = PagedCache.plain(HostDevice())
    stream = HostStream()

    def bad() -> None:
        raise ZeroDivisionError

    stream.enqueue(bad)
    with cache.engine() as engine:
        ticket = engine.save_blocks(keys_of(1, 2), [1, 2], stream=stream)
        assert not ticket.wait().any() and "ZeroDivisionError" in str(ticket.error)
        assert not engine.check_blocks(keys_of(1, 2)).any() and engine.get_stats().reserved_blocks == 0
        stream.close()
        with pytest.raises(ArgumentError, match="was closed"):
            engine.save_blocks(keys_of(1), [1], stream=stream)


def test_the_error_of_a_save_that_was_waited_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr("kvortex.transfer.host.copy_paged", refuse)
    cache = PagedCache.plain(HostDevice())
    gate, stream = threading.Event(), HostStream()
    stream.enqueue(gate.wait)
    with cache.engine() as engine:
        engine.save_blocks(keys_of(1), [1], stream=stream)
        second = engine.save_blocks(keys_of(1), [1])
        gate.set()
        assert not second.wait().any() and "planted" in str(second.error)
    stream.close()
