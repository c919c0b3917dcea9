"""What is handed out while disks, servers and stores fail in every way that is known here?

Each campaign injects faults at random and counts what must never be: ``wrong_bytes``, ``hangs`` (waits beyond their deadlines),
``leaked`` (slots and pins that nobody holds), and ``raised`` (errors that no call of a tier may raise). Processes that write
are killed besides: what they said was stored must be there, and what they deleted must not. ``served_again`` says whether all
tiers gave back what they took once the faults were over. And of bits flipped at rest, one a record, none may be ``unseen``. The
modules say what each injects. ``broken`` is the sum of all that must be 0 but ``wrong_bytes``. Runs on the host, whatever
``--device`` says.
"""

from __future__ import annotations

from typing import Any

from perf import faults_cascade, faults_disk, faults_remote, flips_tiers, kills_disk
from perf.report import Report, progress

PARTS = {"disk": faults_disk, "remote": faults_remote, "cascade": faults_cascade}
FAULTS, QUICK_FAULTS, SEED = 40_000, 300, 1  # of each part
KILLS, QUICK_KILLS = 250, 3
KEYS = ("campaign",)
BETTER: dict[str, str] = {}
FLIPS, QUICK_FLIPS = 10_000, 60  # in each tier
_NEVER = ("hangs", "leaked", "raised", "returned_after_delete", "lost", "unseen")
COLUMNS = (*KEYS, "faults", "operations", "wrong_bytes", "hangs", "leaked", "broken", "served_again", "seconds")


def measure(device_name: str, *, quick: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The device's name, a row a campaign, and the number of faults of each."""
    rows = []
    for name, part in PARTS.items():
        progress(name)
        found = part.campaign(SEED, QUICK_FAULTS if quick else FAULTS)
        rows += [_row(row.get("tier", name), row) for row in found.get("tiers", [found])]
    rows += [_row(row["tier"], row) for row in flips_tiers.campaign(SEED, QUICK_FLIPS if quick else FLIPS)["tiers"]]
    progress("processes killed in the middle of writes")
    killed = kills_disk.kills(SEED, QUICK_KILLS if quick else KILLS)
    rows.append(_row("disk, kill -9", killed | {"faults": killed["kills"], "operations": killed["acknowledged"]}))
    return "host", rows, {"seed": SEED, "faults": sum(row["faults"] for row in rows)}


def _row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    broken = sum(int(found.get(what, 0)) for what in _NEVER) + (not found.get("served_again", True))
    return dict.fromkeys(COLUMNS, 0) | {"campaign": name} | found | {"broken": broken}


def draw(axes: Any, report: Report) -> None:
    """Faults of each kind."""
    bars = [(f"{row['campaign']}: {kind}", count) for row in report.rows for kind, count in row.get("kinds", {}).items()]
    axes.barh(range(len(bars)), [count for _, count in bars], 0.7, color="#27608f")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=3.5)
    axes.set_xlabel("faults injected")
    axes.set_title(f"{report.notes['faults']} faults, {report.wrong_bytes} wrong bytes", fontsize=10)
