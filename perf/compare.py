"""``python perf/compare.py A.json B.json``: what changed from one result of a question to another, row by row.

A ratio above 1 is better in B, whether the figure is one that should be high (a rate) or low (a time).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: only its own folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvortex.errors import ArgumentError, cut, shown

WORSE, REFUSED = 1, 2  # exit statuses
_DIRECTIONS = {"higher": 1, "lower": -1}
Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A result file, checked: ``rows`` by their keys, in order."""

    path: Path
    name: str
    device: str
    quick: bool
    keys: tuple[str, ...]
    better: dict[str, str]
    rows: dict[tuple[Any, ...], Row]


@dataclass(frozen=True)
class Change:
    """A figure of a row in both results; ``ratio`` is above 1 where B is better."""

    row: tuple[Any, ...]
    figure: str
    a: float
    b: float
    ratio: float


def read(path: Path) -> Result:
    """A result that ``python -m perf`` wrote.

    Raises
    ------
    ArgumentError
        It cannot be read, or is no such result; the message says which and why.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror or error}") from None
    except RecursionError:
        raise ArgumentError(f"{path}: is no JSON: nested too deeply") from None
    except ValueError as error:
        raise ArgumentError(f"{path}: is no JSON: {cut(str(error), 200)}") from None
    try:
        return _checked(path, found)
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}") from None


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


def _checked(path: Path, found: Any) -> Result:
    fields = {"name": str, "command": str, "environment": dict, "rows": list}
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in fields.items()):
        raise ArgumentError(f"is no result of python -m perf: it needs {', '.join(fields)}; seen: {shown(found)}")
    keys, better = found.get("keys"), found.get("better")
    if not isinstance(keys, list) or not keys or not isinstance(better, dict) or not better:
        raise ArgumentError("does not say what names its rows (keys, better): an older version wrote it; measure again")
    if not all(isinstance(key, str) for key in keys) or not set(map(str, better.values())) <= set(_DIRECTIONS):
        seen = shown([keys, better])
        raise ArgumentError(f"keys must name columns, and better map columns to 'higher' or 'lower'; seen: {seen}")
    rows: dict[tuple[Any, ...], Row] = {}
    for at, row in enumerate(found["rows"]):
        name = _named(at, row, keys, better)
        if name in rows:
            raise ArgumentError(f"row {at}: {_text(name)} is there twice")
        rows[name] = row
    quick = "--quick" in found["command"].split()
    return Result(path, found["name"], _device(found["environment"]), quick, tuple(keys), better, rows)


def _named(at: int, row: Any, keys: list[str], better: dict[str, str]) -> tuple[Any, ...]:
    """What names a row, once it is known to be whole."""
    if not isinstance(row, dict) or not all(isinstance(row.get(key), (str, int)) for key in keys):
        raise ArgumentError(f"row {at}: must have {', '.join(keys)}; seen: {shown(row)}")
    for figure in (*better, "wrong_bytes"):
        value = row.get(figure, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
            raise ArgumentError(f"row {at}: {figure} = {shown(value)}: must be a number from 0 on")
    return tuple(row[key] for key in keys)


def _device(environment: dict[str, Any]) -> str:
    """The GPU, or the host with its processor, as far as results tell."""
    device = environment.get("device")
    if not isinstance(device, dict) or not device:
        raise ArgumentError("does not say on which device it was measured")
    return str(device.get("gpu") or f"{device.get('device')}, {device.get('cpu')}, {device.get('cores')} cores")


def changes(a: Result, b: Result) -> list[Change]:
    """Every figure that both results have, in the order of B.

    Raises
    ------
    ArgumentError
        They answer different questions, are of different devices, or have no row in common.
    """
    for what in ("name", "device", "quick", "keys"):
        one, other = getattr(a, what), getattr(b, what)
        if one != other:
            label = {"name": "question", "quick": "--quick"}.get(what, what)
            raise ArgumentError(f"{a.path} and {b.path} cannot be compared: {label} is {shown(one)} here, {shown(other)} there")
    found = [
        Change(name, figure, row_a[figure], row_b[figure], _ratio(row_a[figure], row_b[figure], _DIRECTIONS[direction]))
        for name, row_b in b.rows.items()
        if (row_a := a.rows.get(name)) is not None
        for figure, direction in b.better.items()
        if figure in row_a and figure in row_b
    ]
    if not found:
        raise ArgumentError(f"{a.path} and {b.path} have no row in common")
    return found


def _ratio(a: float, b: float, direction: int) -> float:
    better, than = (b, a) if direction > 0 else (a, b)
    if better == than:
        return 1.0
    return better / than if than else math.inf


def table(found: list[Change], keys: tuple[str, ...], tolerance: float) -> str:
    """Aligned text, a line a figure; what got worse beyond the tolerance is flagged."""
    lines = [[*keys, "figure", "A", "B", "ratio", ""]]
    for change in found:
        flag = "worse" if change.ratio < 1 - tolerance else ""
        lines.append([*map(str, change.row), change.figure, f"{change.a:.4g}", f"{change.b:.4g}", f"{change.ratio:.3f}", flag])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in lines)


def _text(name: tuple[Any, ...]) -> str:
    return " ".join(map(str, name))


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number from 0 on")
    return value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python perf/compare.py", description=__doc__)
    parser.add_argument("a", type=Path, metavar="A.json", help="result to compare with")
    parser.add_argument("b", type=Path, metavar="B.json", help="newer result of the same question on the same device")
    parser.add_argument("--tolerance", type=_share, default=0.05, help="how much worse is not flagged (default 0.05)")
    parser.add_argument("--fail-below", type=_share, metavar="RATIO", help="exit with 1 if a ratio is, or bytes of B are wrong")
    arguments = parser.parse_args(argv)
    try:
        a, b = read(arguments.a), read(arguments.b)
        found = changes(a, b)
    except ArgumentError as error:
        print(f"compare: {error}", file=sys.stderr)
        return REFUSED
    print(table(found, b.keys, arguments.tolerance))
    for one, other in ((a, b), (b, a)):
        if missing := [_text(name) for name in one.rows if name not in other.rows]:
            print(f"only in {one.path}: {'; '.join(missing)}")
    wrong = sum(row.get("wrong_bytes", 0) for row in b.rows.values())
    if wrong:
        print(f"{b.path}: {wrong} bytes were wrong")
    limit = arguments.fail_below
    return WORSE if limit is not None and (wrong or any(change.ratio < limit for change in found)) else 0


if __name__ == "__main__":
    sys.exit(main())
