"""``kvortex tier``: what lies in a tier below RAM, whether it is whole, and that it goes away."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kvortex.cli import console
from kvortex.errors import ArgumentError, hidden
from kvortex.tiers import tools

_WRONG = ("corrupt", "unreadable")


def run(arguments: argparse.Namespace) -> int:
    """The command; 1 where ``verify`` found a record that is not what was stored."""
    if arguments.action == "purge" and not arguments.yes:
        raise ArgumentError(f"tier purge {hidden(arguments.url)}: removes every record there; say --yes if that is meant")
    found = tools.act(arguments.action, arguments.url)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for facts in found:
            console.table(f"{arguments.action} of {hidden(arguments.url)}", [_row(name, facts[name]) for name in facts])
    return int(arguments.action == "verify" and any(facts.get(name) for facts in found for name in _WRONG))


def _row(name: str, value: Any) -> tuple[str, str]:
    if isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, int) and name.endswith("_bytes"):
        text = f"{console.amount(value)}"
    elif isinstance(value, (list, tuple)):
        text = ", ".join(map(str, value)) or "none"
    else:
        text = str(value)
    return name.replace("_", " "), text
