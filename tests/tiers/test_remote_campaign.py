"""The campaign of faults against remote tiers, small; and it notices what it is there to notice."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.tiers.base import Outcome
from kvortex.tiers.record import RecordFormat
from kvortex.tiers.remote import arrivals
from perf import faults_remote, tiers_remote
from tests.tiers import servers


def run(seed: int, faults: int, tier: str) -> dict:
    try:
        return faults_remote.campaign(seed, faults, (tier,))
    except servers.Absent as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("tier", ["redis", "s3"])
def test_faults_cost_records_and_nothing_else(tier: str) -> None:
    found = run(3, 600, tier)
    assert found["faults"] >= 600 and found["served_again"]
    assert found["wrong_bytes"] == found["hangs"] == found["raised"] == found["leaked"] == 0
    kinds = found["tiers"][0]["kinds"]
    assert {kind.partition(":")[0] for kind in kinds} == {"at rest", "on the way", "server"}
    assert found["tiers"][0]["records_right"] > 500


@pytest.mark.parametrize("tier", ["redis", "s3"])
def test_a_tier_that_checks_no_payloads_is_found_out(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals.Arrivals, "_payload_checks", lambda self, at: np.ones(len(at), bool))
    assert run(3, 200, tier)["wrong_bytes"] > 0


def test_a_tier_that_checks_no_headers_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordFormat, "check_headers", lambda self, headers, keys: np.full(len(keys), Outcome.OK, np.uint8))
    monkeypatch.setattr(arrivals.Arrivals, "_payload_checks", lambda self, at: np.ones(len(at), bool))
    assert run(3, 200, "redis")["wrong_bytes"] > 0


def test_the_measurement_against_bare_clients_runs() -> None:
    found = tiers_remote.rows(quick=True)
    assert {row["tier"] for row in found} >= {"s3"} and all(row["wrong_bytes"] == 0 < row["gb_per_s"] for row in found)
