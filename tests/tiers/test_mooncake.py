"""The Mooncake tier: against a stand-in that fails as it is told, and against the real one where that is installed."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import types
from collections.abc import Iterator

import numpy as np
import pytest

from kvortex.errors import ConfigError
from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.mooncake import MooncakeOptions, MooncakeTier
from kvortex.tiers.record import RecordFormat
from tests.tiers import servers
from tests.tiers.misbehaving import until
from tests.tiers.racks import FORMAT, Rack

TOLERANCE = 2.0


class StandIn:
    """Mooncake's client as its documentation and its real behaviour have it, in this process."""

    objects: dict[str, bytes] = {}
    codes: dict[str, int] = {}  # what calls answer instead
    hangs: threading.Event | None = None  # what calls wait for
    registered: list[tuple[int, int]] = []

    def setup(self, *arguments: object) -> int:
        self._hang()
        return self.codes.get("setup", 0)

    def register_buffer(self, address: int, nbytes: int) -> int:
        self.registered.append((address, nbytes))
        return 0

    def batch_is_exist(self, keys: list[str]) -> list[int]:
        self._hang()
        return [self.codes.get("exist", int(key in self.objects)) for key in keys]

    def batch_put_from(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        self._hang()
        for key, address, size in zip(keys, addresses, sizes, strict=True):
            assert any(start <= address and address + size <= start + count for start, count in self.registered)
            if "put" not in self.codes:
                self.objects.setdefault(key, ctypes.string_at(address, size))  # the first value stays
        return [self.codes.get("put", 0)] * len(keys)

    def batch_get_into(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        self._hang()
        found = []
        for key, address, size in zip(keys, addresses, sizes, strict=True):
            value = self.objects.get(key)
            if value is None or len(value) > size or "get" in self.codes:
                found.append(self.codes.get("get", -704 if value is None else -600))
            else:
                ctypes.memmove(address, value, len(value))
                found.append(len(value))
        return found

    def remove(self, key: str, force: bool) -> int:
        self._hang()
        return 0 if force and self.objects.pop(key, None) is not None else -704

    def close(self) -> int:
        return 0

    def _hang(self) -> None:
        if self.hangs is not None:
            self.hangs.wait(30)
        if "raise" in self.codes:
            raise RuntimeError("the client is broken")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    module = types.ModuleType("mooncake.store")
    module.MooncakeDistributedStore = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mooncake", types.ModuleType("mooncake"))
    monkeypatch.setitem(sys.modules, "mooncake.store", module)
    StandIn.objects, StandIn.codes, StandIn.hangs, StandIn.registered = {}, {}, None, []
    yield StandIn


@pytest.fixture
def tier(stand_in: type[StandIn]) -> Iterator[MooncakeTier]:
    tier = MooncakeTier(MooncakeOptions(master="127.0.0.1:1", buffers=2), FORMAT)
    yield tier
    tier.close()


def test_what_was_put_comes_back(stand_in: type[StandIn], tier: MooncakeTier) -> None:
    rack = Rack([2 << 20, 300, 4096, 1] * 4)
    assert not rack.has(tier).any() and (rack.get(tier).outcomes == Outcome.MISS).all()
    assert (rack.put(tier) == Outcome.OK).all() and rack.has(tier).all() and tier.probe(rack.call()) is None
    assert (rack.get(tier).outcomes == Outcome.OK).all()
    assert tier.delete(rack.keys[:2], rack.call()).tolist() == [Outcome.OK] * 2
    assert tier.delete(rack.keys[:2], rack.call()).tolist() == [Outcome.MISS] * 2
    other = MooncakeTier(tier.options, RecordFormat(bytes(32), FORMAT.most_bytes))
    assert not rack.has(other).any() and (rack.get(other).outcomes == Outcome.MISS).all()
    other.close()
    assert rack.wrong_bytes == 0


def test_damage_is_told_and_dropped(stand_in: type[StandIn], tier: MooncakeTier) -> None:
    rack = Rack([500])
    rng = np.random.default_rng(2)
    for place in rng.choice(np.arange(12, 644), 100, replace=False):
        assert rack.put(tier)[0] == Outcome.OK
        name, value = next(iter(stand_in.objects.items()))
        stand_in.objects[name] = value[:place] + bytes([value[place] ^ (1 << int(rng.integers(8)))]) + value[place + 1 :]
        assert rack.get(tier).outcomes[0] == Outcome.CORRUPT and not stand_in.objects
    for changed, wanted in ((b"", Outcome.MISS), (b"hello", Outcome.MISS), (value[:-1], Outcome.CORRUPT)):
        stand_in.objects[name] = changed
        assert rack.get(tier).outcomes[0] == wanted
    assert rack.wrong_bytes == 0


@pytest.mark.parametrize(
    ("code", "put", "get"),
    [(-200, Outcome.FULL, Outcome.FULL), (-600, Outcome.MISS, Outcome.MISS), (-705, Outcome.OK, Outcome.FAILED),
     (-800, Outcome.FAILED, Outcome.FAILED), (-900, Outcome.FAILED, Outcome.FAILED)],
)  # fmt: skip
def test_codes_are_outcomes(stand_in: type[StandIn], tier: MooncakeTier, code: int, put: Outcome, get: Outcome) -> None:
    rack = Rack([300])
    stand_in.codes = {"put": code}
    assert rack.put(tier)[0] == put
    stand_in.codes = {"get": code}
    assert rack.get(tier).outcomes[0] == get
    stand_in.codes = {"exist": -1}
    assert rack.has(tier) is None


def test_a_call_that_hangs_is_left_behind_and_touches_no_slot(stand_in: type[StandIn], tier: MooncakeTier) -> None:
    rack = Rack([4096] * 3)
    assert (rack.put(tier) == Outcome.OK).all()
    stand_in.hangs = hangs = threading.Event()
    for _ in range(2):
        assert (rack.get(tier, seconds=0.1).outcomes == Outcome.TIMEOUT).all()
    assert (rack.put(tier, seconds=0.1) == Outcome.TIMEOUT).all() and rack.has(tier, seconds=0.1) is None
    end = time.monotonic() + 0.1
    call = Call(time.monotonic() + 20, lambda: time.monotonic() > end)
    assert (tier.get_into(rack.keys, rack.targets, rack.sizes, call).outcomes == Outcome.CANCELLED).all()
    assert rack.latest < TOLERANCE and tier._left_behind >= 3
    rack.get(tier, seconds=0)  # canaries
    stand_in.hangs = None
    hangs.set()
    assert until(lambda: tier._left_behind == 0)
    assert (rack._target == 0xA5).all()
    for _ in range(4):  # both buffers are there again
        assert (rack.get(tier).outcomes == Outcome.OK).all()
    assert tier._buffers.qsize() == 2 and rack.wrong_bytes == 0


def test_an_interrupt_while_a_call_begins_leaves_its_buffer_to_it(
    stand_in: type[StandIn], tier: MooncakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else gets the buffer while Mooncake writes there."""
    rack = Rack([4096])
    assert rack.put(tier)[0] == Outcome.OK
    buffers, stand_in.hangs = tier._buffers.qsize(), threading.Event()
    start, left = threading.Thread.start, [1]

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "kvortex-mooncake":
            left[0] -= 1
            if left[0] < 0:  # the first of them makes sure that the store is open
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted)
        rack.get(tier)
    assert tier._buffers.qsize() == buffers - 1 and tier._left_behind == 1
    stand_in.hangs.set()
    assert until(lambda: tier._buffers.qsize() == buffers and tier._left_behind == 0)
    assert rack.get(tier).outcomes[0] == Outcome.OK and rack.wrong_bytes == 0


def test_without_a_thread_a_call_fails(stand_in: type[StandIn], tier: MooncakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    rack = Rack([4096])
    assert rack.put(tier)[0] == Outcome.OK
    buffers = tier._buffers.qsize()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert rack.get(tier).outcomes[0] == Outcome.FAILED and rack.put(tier)[0] == Outcome.FAILED
    assert tier._buffers.qsize() == buffers and tier._left_behind == 0
    assert rack.get(tier).outcomes[0] == Outcome.OK and rack.wrong_bytes == 0


def test_a_client_that_raises_or_cannot_be_set_up_fails(stand_in: type[StandIn], tier: MooncakeTier) -> None:
    rack = Rack([300])
    stand_in.codes = {"setup": -900}
    assert rack.put(tier)[0] == Outcome.FAILED and "-900" in tier.trouble
    stand_in.codes = {}
    assert rack.put(tier)[0] == Outcome.OK
    stand_in.codes = {"raise": 1}
    assert rack.get(tier).outcomes[0] == Outcome.FAILED and "broken" in tier.trouble
    stand_in.codes = {}
    assert rack.get(tier).outcomes[0] == Outcome.OK
    tier.close()
    assert rack.get(tier).outcomes[0] == Outcome.FAILED


@pytest.mark.parametrize(
    "options", [{"master": "h"}, {"master": 3}, {"hostname": ""}, {"buffers": 0}, {"buffer_bytes": True}, {"segment_bytes": -1}]
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        MooncakeOptions(**({"master": "h:1"} | options))  # type: ignore[arg-type]


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(ConfigError, match="extra mooncake"):
        MooncakeTier(MooncakeOptions(master="h:1"), FORMAT)


REAL = """
import sys
from kvortex.tiers.base import Outcome
from kvortex.tiers.mooncake import MooncakeOptions, MooncakeTier
from tests.tiers.racks import FORMAT, Rack
rack = Rack([1 << 20, 300, 4096, 1] * 4)
for turn in range(2):
    tier = MooncakeTier(MooncakeOptions(master=sys.argv[1]), FORMAT)
    if not turn:
        assert not rack.has(tier).any() and (rack.get(tier).outcomes == Outcome.MISS).all()
        assert (rack.put(tier) == Outcome.OK).all(), tier.trouble
    assert rack.has(tier).all() and (rack.put(tier) == Outcome.OK).all()
    # On a busy machine a lease may expire before the data have come, which is a failure of that get.
    assert any((rack.get(tier).outcomes == Outcome.OK).all() for _ in range(10)), tier.trouble
    assert any(tier.probe(rack.call()) is None for _ in range(10)), tier.trouble
    tier.close()
    assert rack.wrong_bytes == 0
"""


def test_the_real_one() -> None:
    """In a process of its own: its threads stay after it is closed."""
    import subprocess

    try:
        with servers.mooncake() as (address, _, _):
            done = subprocess.run([sys.executable, "-c", REAL, address], capture_output=True, text=True, timeout=120)
    except servers.Absent as error:
        pytest.skip(str(error))
    assert done.returncode == 0, done.stderr[-3000:]
