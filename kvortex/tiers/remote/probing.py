"""Whether a tier works: what get and put do, with a record of its own."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from kvortex.digests import digest_records
from kvortex.tiers.base import Call, Outcome, Tier
from kvortex.tiers.record import RecordFormat

_PROBE_BYTES = 4096  # at most: a tier takes no record that is larger than its blocks


def probe_record(tier: Tier, form: RecordFormat, call: Call, trouble: Callable[[], str]) -> str | None:
    """Stores, finds, fetches and deletes a record under a name that nobody else has; None, or what went wrong.

    ``trouble`` says what the tier knows of the last failure.
    """
    nbytes = min(_PROBE_BYTES, form.most_bytes)
    memory = np.frombuffer(bytearray(os.urandom(3 * _PROBE_BYTES)), np.uint8)
    start = -memory.ctypes.data % _PROBE_BYTES
    payload = memory[start : start + nbytes]
    keys = np.frombuffer(os.urandom(32), np.uint8).reshape(1, 32)
    at, sizes = np.array([payload.ctypes.data], np.int64), np.array([nbytes], np.int64)
    digests = np.empty((1, 16), np.uint8)
    digest_records(at, sizes, digests)
    sent = payload.tobytes()

    def said(step: str, outcome: int) -> str:
        return f"{step}: {trouble() or Outcome(outcome).name}"

    outcome = int(tier.put_from(keys, at, sizes, digests, call)[0])
    if outcome != Outcome.OK:
        return said("put", outcome)
    there = tier.contains(keys, call)
    if there is None or not there[0]:
        return said("contains", Outcome.FAILED if there is None else Outcome.MISS)
    payload[:] = 0
    outcome = int(tier.get_into(keys, at, sizes, call).outcomes[0])
    if outcome != Outcome.OK or payload.tobytes() != sent:
        return said("get", outcome)
    outcome = int(tier.delete(keys, call)[0])
    return None if outcome == Outcome.OK else said("delete", outcome)
