"""One bit of each record flipped where it rests, and whether that was seen: on disk, in Redis, and in a store that speaks S3.

A batch of records is stored, a bit is flipped at random in header or payload of all but the first, and all are fetched. The
first must come back whole, and none of the others: one that a tier hands out was not ``seen``, nor one that only made a call
fail.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvortex.tiers import Outcome, Tier
from kvortex.tiers.record import HEADER_BYTES
from perf.memory_store import MemoryStore
from perf.report import progress

SIZES = (1, 100, 777, 1500, 4096, 6000)
BATCH = 48
Flip = Callable[[bytes, int, int], None]  # a key, a byte of its record (the header first), a bit of that


@contextlib.contextmanager
def _disk() -> Iterator[tuple[Tier, Flip]]:
    from kvortex.tiers.disk import DiskOptions, DiskTier
    from kvortex.tiers.disk.pages import PAGE
    from kvortex.tiers.disk.slab import START, slot_bytes_for
    from tests.tiers.racks import FORMAT

    capacity = START + 2 * BATCH * slot_bytes_for(FORMAT.most_bytes)
    with tempfile.TemporaryDirectory(prefix="kvortex-flips-") as folder:
        tier = DiskTier(DiskOptions(paths=folder, capacity_bytes=capacity), FORMAT)
        with contextlib.closing(tier), open(tier._store.slabs[0].path, "r+b", buffering=0) as file:

            def flip(key: bytes, at: int, bit: int) -> None:
                keys = np.frombuffer(key, np.uint8).reshape(1, 32)
                (slot,) = slots = tier._store.index.acquire(keys)
                _, offset = tier._store.where(int(tier._store.places.of_slot[slot]))
                tier._store.index.release(slots)
                offset += at if at < HEADER_BYTES else PAGE + at - HEADER_BYTES
                byte = os.pread(file.fileno(), 1, offset)[0]
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)

            yield tier, flip


@contextlib.contextmanager
def _redis() -> Iterator[tuple[Tier, Flip]]:
    import redis

    from kvortex.tiers.redis import RedisOptions, RedisTier
    from kvortex.tiers.redis.layout import body_name, head_name, names
    from tests.tiers import servers
    from tests.tiers.racks import FORMAT, NAMESPACE

    with servers.redis_server("--maxmemory", "64mb") as (port, _), redis.Redis(port=port) as client:
        tier = RedisTier(RedisOptions(url=f"redis://127.0.0.1:{port}"), FORMAT)

        def flip(key: bytes, at: int, bit: int) -> None:
            (name,) = names(NAMESPACE, [key])
            body = client.strlen(body_name(name))
            in_body = HEADER_BYTES <= at < HEADER_BYTES + body
            part = body_name(name) if in_body else head_name(name)
            offset = at - HEADER_BYTES if in_body else at - body * (at >= HEADER_BYTES)
            byte = client.getrange(part, offset, offset)[0]
            client.setrange(part, offset, bytes([byte ^ 1 << bit]))

        with contextlib.closing(tier):
            yield tier, flip


@contextlib.contextmanager
def _s3() -> Iterator[tuple[Tier, Flip]]:
    from kvortex.tiers.s3 import S3Options, S3Tier
    from tests.tiers.racks import FORMAT, NAMESPACE

    with contextlib.closing(MemoryStore()) as store:
        login = {"access_key_id": "k", "secret_access_key": "s"}
        tier = S3Tier(S3Options(bucket="flips", endpoint=store.endpoint, **login), FORMAT)

        def flip(key: bytes, at: int, bit: int) -> None:
            path = f"/flips/kvortex/{NAMESPACE.hex()}/{key.hex()[:2]}/{key.hex()}"
            record = bytearray(store.objects[path])
            record[at] ^= 1 << bit
            store.objects[path] = record

        with contextlib.closing(tier):
            yield tier, flip


TIERS = {"disk": _disk, "redis": _redis, "s3": _s3}


def campaign(seed: int, tries: int) -> dict[str, Any]:
    """So many flips in each tier: ``tiers``, a dict each with ``faults``, ``seen``, ``wrong_bytes``, ``lost`` (records that
    nobody touched and that did not come back), ``seconds``. A tier whose server is not installed has none."""
    from tests.tiers import servers

    found = []
    for name, opened in TIERS.items():
        progress(f"{tries} flipped bits, {name}")
        with contextlib.suppress(servers.Absent), opened() as (tier, flip):
            found.append({"tier": f"{name}, a bit of each record", "seed": seed} | _flips(tier, flip, seed, tries))
    return {"tiers": found}


def _flips(tier: Tier, flip: Flip, seed: int, tries: int) -> dict[str, Any]:
    from tests.tiers.racks import Rack

    began, draw = time.monotonic(), random.Random(seed)
    rack = Rack([SIZES[at % len(SIZES)] for at in range(BATCH)], seed=seed)
    faults = seen = lost = operations = 0
    while faults < tries:
        lost += int((rack.put(tier) != Outcome.OK).sum())
        damaged = range(1, 1 + min(BATCH - 1, tries - faults))
        for at in damaged:
            bit = draw.randrange(8 * (HEADER_BYTES + int(rack.sizes[at])))
            flip(rack.keys[at].tobytes(), bit // 8, bit % 8)
        outcomes = rack.get(tier).outcomes
        whole = np.ones(BATCH, bool)
        whole[damaged.start : damaged.stop] = False
        told = np.isin(outcomes[~whole], (Outcome.CORRUPT, Outcome.MISS))  # the latter where it is no record any more
        faults, seen = faults + len(damaged), seen + int(told.sum())
        lost += int((outcomes[whole] != Outcome.OK).sum())
        operations += 2
    return {
        "faults": faults,
        "seen": seen,
        "unseen": faults - seen,
        "lost": lost,
        "operations": operations,
        "wrong_bytes": rack.wrong_bytes,
        "kinds": {"at rest: one bit of a record": faults},
        "seconds": time.monotonic() - began,
    }
