"""The campaign over a whole engine at small scale: its faults happen, and a planted bug is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvortex.tiers.base import Outcome
from kvortex.tiers.promotion import Fetcher
from kvortex.tiers.remote.arrivals import Arrivals
from kvortex.tiers.s3 import S3Tier
from perf import faults, faults_cascade, flips_tiers
from perf.faulty import FAULTS


def test_nothing_that_must_never_be() -> None:
    found = faults_cascade.campaign(3, 1200)
    row = faults._row("faults_cascade", found)
    assert found["faults"] >= 1200 and set(found["kinds"]) == set(FAULTS) and min(found["kinds"].values()) > 0
    assert (row["wrong_bytes"], row["broken"]) == (0, 0) and found["served_again"] and found["blocks_right"] > 50


def test_wrong_bytes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promotion that takes what a tier said is damaged."""

    def bring(self: Fetcher, promotion: object, at: int, keys: object, sizes: object, slots: object) -> object:
        line, room = self._cascade.lines[at], self._room
        whole = np.full(len(keys), room.slot_bytes)  # type: ignore[arg-type]
        fetched = line.guard.get_into(keys, room.at(slots), whole, line.call(1.0))  # type: ignore[arg-type]
        return (fetched.outcomes == Outcome.OK) | (fetched.outcomes == Outcome.CORRUPT)

    monkeypatch.setattr(Fetcher, "_bring", bring)
    assert faults_cascade.campaign(3, 600)["wrong_bytes"] > 0


def test_every_flipped_bit_is_seen() -> None:
    found = flips_tiers.campaign(5, 100)["tiers"]
    assert {row["tier"].partition(",")[0] for row in found} >= {"disk", "s3"}  # and redis, where it is installed
    for row in found:
        assert (row["faults"], row["seen"], row["lost"], row["wrong_bytes"]) == (100, 100, 0, 0)


def test_flips_that_go_unseen_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier that looks at no payload."""
    monkeypatch.setattr(Arrivals, "_payload_checks", lambda self, at: np.ones(len(at), bool))
    (row,) = (row for row in flips_tiers.campaign(5, 100)["tiers"] if row["tier"].startswith("s3"))
    assert row["seen"] < 100 and row["wrong_bytes"] > 0 and faults._row("x", row)["broken"] >= row["unseen"] > 0


def test_a_flip_that_only_made_a_call_fail_was_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    get = S3Tier.get_into

    def failing(*arguments: Any) -> Any:
        found = get(*arguments)
        found.outcomes[found.outcomes == Outcome.CORRUPT] = Outcome.FAILED
        return found

    monkeypatch.setattr(S3Tier, "get_into", failing)
    (row,) = (row for row in flips_tiers.campaign(5, 100)["tiers"] if row["tier"].startswith("s3"))
    assert row["unseen"] > 50 and row["wrong_bytes"] == 0


def test_leaks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults_cascade, "_comes_true", lambda true, _: true())
    life = faults_cascade.Life.__new__(faults_cascade.Life)
    life.found = {"leaked": 0, "raised": 0}

    class Stats:
        pinned_blocks, reserved_blocks = 2, 1

    class Engine:
        notes = ("something",)
        _index = type("Index", (), {"check": staticmethod(lambda: None)})

        def get_stats(self) -> Stats:
            return Stats()

    life._look_for_leaks(Engine())  # type: ignore[arg-type]
    assert life.found == {"leaked": 3, "raised": 1}
    row = faults._row("x", {"faults": 1, "leaked": 3, "raised": 1, "served_again": False})
    assert row["broken"] == 5 and row["campaign"] == "x"
