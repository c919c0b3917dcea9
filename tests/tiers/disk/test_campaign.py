"""Faults by the hundred and kills by the dozen; many more by ``python -m perf faults``, or with KVORTEX_TEST_KILLS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perf.faults_disk import campaign
from perf.faults_system import HONEST_READS, HONEST_WRITES, LYING_READS, LYING_WRITES, AtRest
from perf.kills_disk import kills

KILLS = int(os.environ.get("KVORTEX_TEST_KILLS", "20"))
RIGHT = {"wrong_bytes": 0, "hangs": 0, "leaked": 0, "raised": 0, "returned_after_delete": 0, "served_again": True}


@pytest.mark.parametrize("seed", [1, 2])
def test_no_fault_hands_out_a_wrong_byte(tmp_path: Path, seed: int) -> None:
    seen: list[tuple[int, int]] = []
    found = campaign(seed, 4000, tmp_path, lambda done, of: seen.append((done, of)))
    assert found | RIGHT == found and found["faults"] >= 4000 and found["records_right"] > 1000
    kinds = {"killed between calls", *HONEST_READS, *HONEST_WRITES, *LYING_READS, *LYING_WRITES, *AtRest.KINDS}
    kinds -= {"killed while writing"}  # seldom; the next test does nothing else
    assert kinds <= set(found["kinds"]), "a kind was never tried"
    assert sum(found["kinds"].values()) == found["faults"] and seen[-1][1] == 4000
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    found = kills(1, KILLS, tmp_path)
    assert found["kills"] == KILLS and found["acknowledged"] > KILLS and found["records_right"] > KILLS
    assert found["lost"] == found["wrong_bytes"] == found["returned_after_delete"] == 0 and found["served_again"]
    assert list(tmp_path.iterdir()) == []
