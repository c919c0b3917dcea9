"""What the Redis and S3 tiers hand out while their servers, the way there and what is stored fail in every way known here.

:func:`campaign` injects so many faults and counts what must never be: wrong bytes, calls that come back after their deadline,
errors that are raised, a tier that does not serve again, threads and connections that are left.

Most faults damage records at rest, many at once: any bit of either part, cut, lengthened, swapped for another's, of another
type, gone. Others hit the bytes on their way, through a proxy, at any place of a conversation and in both directions: cut,
reset, flipped, inserted, dropped, held back, dripped. And the server itself is paused, or killed and started again. Redis is a
real server; S3 is ``memory_store.py``, since real ones take milliseconds a request.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvortex.tiers import Outcome, Tier
from perf.memory_store import MemoryStore

_SIZES = (1, 100, 777, 1500, 4096, 6000)
_BATCH = 48
_SLACK = 2.0  # seconds by which a busy machine may be late
_SHORT, _BETWEEN, _LONG = 0.06, 0.5, 20.0  # seconds until a deadline: where it is to pass, may pass, and may not
_QUICK = ("cut", "reset", "flip", "insert", "drop")
_SLOW = ("stall", "drip")
_PER_SLOW, _PER_SERVER = 100, 600  # faults for each that holds back, and for each that stops the server
_AT_REST = 0.94  # of all faults; those on the way take a hundred times as long
Damage = Callable[[bytes, bytes, random.Random], "bytes | None"]


def _flip(value: bytes, other: bytes, draw: random.Random) -> bytes:
    bit = draw.randrange(8 * len(value))
    return value[: bit // 8] + bytes([value[bit // 8] ^ 1 << bit % 8]) + value[bit // 8 + 1 :]


DAMAGE: dict[str, Damage] = {
    "bit flipped": _flip,
    "bit flipped ": _flip,  # twice as often as the others
    "cut": lambda value, other, draw: value[: draw.randrange(len(value))],
    "lengthened": lambda value, other, draw: value + draw.randbytes(draw.randrange(1, 3000)),
    "first part torn": lambda value, other, draw: draw.randbytes(len(value) // 2) + value[len(value) // 2 :],
    "of another key": lambda value, other, draw: other,
    "foreign": lambda value, other, draw: draw.randbytes(draw.randrange(5000)),
    "older version": lambda value, other, draw: value[:8] + b"\0\0" + value[10:],
    "gone": lambda value, other, draw: None,
}


class _Campaign:
    """One run against one kind of tier. What differs between kinds is at the end."""

    kind = ""

    def __init__(self, seed: int) -> None:
        from tests.tiers.racks import Rack

        self.seed, self.random = seed, random.Random(seed)
        self.rack = Rack([_SIZES[at % len(_SIZES)] for at in range(_BATCH)], seed=seed, seconds=_LONG)
        self.kinds: collections.Counter[str] = collections.Counter()
        self.operations = self.right = self.raised = self.unserved = 0
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.hangs = 0
        self.worst = 0.0  # seconds after a deadline

    def call(self, tier: Tier, what: str, some: Any = slice(None), seconds: float = _LONG) -> np.ndarray:
        """One call of a batch: its outcomes, and what must not be."""
        self.operations += 1
        self.rack.latest = -_LONG
        try:
            found = self.rack.put(tier, some, seconds) if what == "put" else self.rack.get(tier, some, seconds).outcomes
        except Exception as error:
            self.raised += 1
            print(f"perf: {self.kind}: {what} raised {error!r}", file=sys.stderr)
            return np.full(len(self.rack.keys[some]), Outcome.FAILED, np.uint8)
        self.worst = max(self.worst, self.rack.latest)
        self.hangs += self.rack.latest > _SLACK
        self.right += int((found == Outcome.OK).sum()) if what == "get" else 0
        self.outcomes.update(Outcome(each).name for each in found.tolist())
        return found

    def serves(self, tier: Tier) -> None:
        """After a fault, and with patience, all is as it was."""
        for seconds in (_BETWEEN, _LONG):  # of a request that was cut off, a late effect may come in between
            if all((self.call(tier, what, seconds=seconds) == Outcome.OK).all() for what in ("put", "get")):
                return
        self.unserved += 1

    def at_rest(self, tier: Tier) -> None:
        """Every record of a batch damaged, one way each; none may come back, and all that are stored again must."""
        self.call(tier, "put")
        changed = self.damage([self.random.choice(list(DAMAGE)) for _ in range(_BATCH)])
        found = self.call(tier, "get")
        for at, how in enumerate(changed):
            if how is not None:
                self.kinds[f"at rest: {how.strip()}"] += 1
                if found[at] == Outcome.OK:  # its bytes were compared; but it was damaged, and that went unseen
                    self.rack.wrong_bytes += 1
        if self.random.random() < 0.05:
            self.serves(tier)

    def on_the_way(self, tier: Tier, proxy: Any, kinds: tuple[str, ...]) -> None:
        """One fault in the conversation about a few records."""
        from tests.tiers.misbehaving import Fault

        some = self.random.sample(range(_BATCH), 6)
        what, to_server = self.random.choice(("put", "get")), self.random.random() < 0.5
        self.call(tier, "put", some)
        heavy = (what == "put") == to_server
        kind, span = self.random.choice(kinds), 10_000 if heavy else 300
        fault = proxy.arm(Fault(kind, self.random.randrange(span), to_server, self.random.randrange(1, 9), 0.02))
        waits = kind not in ("cut", "reset")
        self.call(tier, what, some, _SHORT if waits else _LONG)
        proxy.disarm()
        if fault.fired.is_set():
            self.kinds[f"on the way: {kind}"] += 1
        if self.random.random() < 0.2 or waits:
            # What was inserted may still lie in front of the next request; after that there is no excuse.
            if (self.call(tier, "put", some, _BETWEEN) != Outcome.OK).any():
                self.unserved += bool((self.call(tier, "put", some) != Outcome.OK).any())
            self.call(tier, "get", some, _BETWEEN)

    def run(self, faults: int, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
        from tests.tiers.misbehaving import misbehaving

        before = _held()
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            port = self.start(stack)
            proxy = stack.enter_context(misbehaving(port))
            tier = stack.enter_context(contextlib.closing(self.tier(port)))
            through = stack.enter_context(contextlib.closing(self.tier(proxy.port)))
            slow, servers = max(2, faults // _PER_SLOW // 5), max(2, faults // _PER_SERVER // 5)
            for _ in range(servers):
                self.server_fault(tier)
            self.serves(tier)
            self.serves(through)
            for _ in range(slow):
                self.on_the_way(through, proxy, _SLOW)
            while (done := self.kinds.total()) < faults:
                if done < faults * (1 - _AT_REST):
                    self.on_the_way(through, proxy, _QUICK)
                else:
                    self.at_rest(tier)
                if progress is not None:
                    progress(min(done, faults), faults)
            self.serves(tier)
            self.serves(through)
        end = time.monotonic() + 10
        while (left := _held()) > before and time.monotonic() < end:
            time.sleep(0.02)
        return self.figures() | {"leaked": max(0, left[0] - before[0]) + max(0, left[1] - before[1]),
                                 "seconds": time.monotonic() - began}  # fmt: skip

    def figures(self) -> dict[str, Any]:
        return {
            "tier": self.kind,
            "seed": self.seed,
            "faults": self.kinds.total(),
            "kinds": dict(sorted(self.kinds.items())),
            "operations": self.operations,
            "outcomes": dict(sorted(self.outcomes.items())),
            "records_right": self.right,
            "wrong_bytes": self.rack.wrong_bytes,
            "hangs": self.hangs,
            "latest_s": self.worst,
            "raised": self.raised,
            "served_again": not self.unserved,
        }

    def start(self, stack: contextlib.ExitStack) -> int:
        """Starts the server; its port."""
        raise NotImplementedError

    def tier(self, port: int) -> Tier:
        raise NotImplementedError

    def damage(self, how: list[str]) -> list[str | None]:
        """Damages each record at rest, and says how it did; None where the damage happens to change nothing."""
        raise NotImplementedError

    def server_fault(self, tier: Tier) -> None:
        """Stops the server, one way or another, in the middle of requests, and lets it go on."""
        raise NotImplementedError


class _RedisCampaign(_Campaign):
    kind = "redis"

    def start(self, stack: contextlib.ExitStack) -> int:
        import redis

        from tests.tiers import servers

        port = servers.free_port()
        _, self.server = stack.enter_context(servers.redis_server("--maxmemory", "64mb", port=port))
        self.client = stack.enter_context(redis.Redis(port=port))
        return port

    def tier(self, port: int) -> Tier:
        from kvortex.tiers.redis import RedisOptions, RedisTier
        from tests.tiers.racks import FORMAT

        return RedisTier(RedisOptions(url=f"redis://127.0.0.1:{port}", connections=2), FORMAT)

    def damage(self, how: list[str]) -> list[str | None]:
        from kvortex.tiers.redis.layout import body_name, head_name, names
        from tests.tiers.racks import NAMESPACE

        records = names(NAMESPACE, [key.tobytes() for key in self.rack.keys])
        parts = [self.random.choice((head_name, body_name))(name) for name in records]
        values = self.client.mget(parts)
        found: list[str | None] = []
        with self.client.pipeline(transaction=False) as pipeline:
            for at, (part, value) in enumerate(zip(parts, values, strict=True)):
                changed = DAMAGE[how[at]](value, values[at - 1], self.random) if value else value
                if self.random.random() < 0.03:
                    pipeline.delete(part)
                    pipeline.rpush(part, b"x")
                    found.append("of another type")
                elif changed is None:
                    pipeline.delete(part)
                    found.append(how[at])
                else:
                    pipeline.set(part, changed)
                    found.append(how[at] if changed != value else None)
            pipeline.execute()
        return found

    def server_fault(self, tier: Tier) -> None:
        self.serves(tier)
        what = self.random.choice(("put", "get"))
        if self.random.random() < 0.5:
            self.server.pause()
            self.call(tier, what, seconds=_SHORT)
            self.server.resume()
            self.kinds["server: paused"] += 1
        else:
            timer = threading.Timer(self.random.uniform(0, 0.004), self.server.stop)
            timer.start()
            while timer.is_alive():
                self.call(tier, what, seconds=_LONG)
            timer.join()
            self.call(tier, what)
            self.server.start()
            self.kinds["server: killed"] += 1


class _S3Campaign(_Campaign):
    kind = "s3"

    def start(self, stack: contextlib.ExitStack) -> int:
        self.store = stack.enter_context(contextlib.closing(MemoryStore()))
        return self.store.port

    def tier(self, port: int) -> Tier:
        from kvortex.tiers.s3 import S3Options, S3Tier
        from tests.tiers.racks import FORMAT

        login = {"access_key_id": "k", "secret_access_key": "s"}
        endpoint = f"http://127.0.0.1:{port}"
        return S3Tier(S3Options(bucket="campaign", endpoint=endpoint, connections=2, retries=1, **login), FORMAT)

    def damage(self, how: list[str]) -> list[str | None]:
        from tests.tiers.racks import NAMESPACE

        names = [key.tobytes().hex() for key in self.rack.keys]
        paths = [f"/campaign/kvortex/{NAMESPACE.hex()}/{name[:2]}/{name}" for name in names]
        values = [bytes(self.store.objects[path]) for path in paths]
        found: list[str | None] = []
        for at, path in enumerate(paths):
            changed = DAMAGE[how[at]](values[at], values[at - 1], self.random)
            if changed is None:
                del self.store.objects[path]
            else:
                self.store.objects[path] = changed
            found.append(how[at] if changed != values[at] else None)
        return found

    def server_fault(self, tier: Tier) -> None:
        """Ends, in the middle of requests, and another begins on its port with what was stored."""
        self.serves(tier)
        timer = threading.Timer(self.random.uniform(0, 0.02), self.store.close)
        timer.start()
        while timer.is_alive():
            self.call(tier, self.random.choice(("put", "get")))
        timer.join()
        self.call(tier, "get")
        objects = self.store.objects
        self.store.__init__(self.store.port)  # type: ignore[misc]
        self.store.objects = objects
        self.kinds["server: killed"] += 1


def _held() -> tuple[int, int]:
    """Threads of tiers and of this campaign, and open files."""
    threads = sum(not thread.daemon for thread in threading.enumerate())
    return threads, len(os.listdir("/proc/self/fd"))


def campaign(
    seed: int, faults: int, tiers: tuple[str, ...] = ("redis", "s3"), progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Injects at least ``faults`` faults, shared evenly between tiers.

    Parameters
    ----------
    seed
        Of all that is random; threads take turns as they like all the same.
    faults
    tiers
    progress
        Told how many of how many faults were injected into the tier of the moment.

    Returns
    -------
    dict
        ``faults``, the sums of ``wrong_bytes``, ``hangs``, ``raised`` and ``leaked``, all of which must be 0, ``served_again``,
        which must be true, and ``tiers``: for each the same, and ``kinds`` (faults of each kind), ``operations``,
        ``outcomes``, ``records_right``, ``latest_s`` (how long after its deadline a call came back, at worst), ``seconds``.

    Raises
    ------
    tests.tiers.servers.Absent
        There is no Redis server.
    """
    from tests.tiers import servers

    servers.wake_obstore()
    kinds = {"redis": _RedisCampaign, "s3": _S3Campaign}
    found = [kinds[name](seed).run(-(-faults // len(tiers)), progress) for name in tiers]
    sums = {name: sum(each[name] for each in found) for name in ("faults", "wrong_bytes", "hangs", "raised", "leaked")}
    return sums | {"served_again": all(each["served_again"] for each in found), "tiers": found}


if __name__ == "__main__":
    import json

    print(json.dumps(campaign(int(sys.argv[1]), int(sys.argv[2])), indent=1))
