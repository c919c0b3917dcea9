"""``python -m perf NAME``: measures, prints a table, writes JSON and a picture. ``all`` answers one question after another."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

from kvortex.errors import KVortexError, told
from perf import (
    answers,
    beside,
    codecs,
    coded,
    compute,
    digest,
    duplex,
    faults,
    fragments,
    gil,
    index,
    keys,
    latency,
    link,
    pinned,
    plane,
    prefix,
    share,
    submit,
    tiers,
    ttft,
)
from perf.report import Report, check_writable, environment, progress

QUESTIONS = {
    "answers": answers,
    "beside": beside,
    "coded": coded,
    "codecs": codecs,
    "compute": compute,
    "digest": digest,
    "duplex": duplex,
    "faults": faults,
    "fragments": fragments,
    "gil": gil,
    "index": index,
    "keys": keys,
    "latency": latency,
    "link": link,
    "pinned": pinned,
    "plane": plane,
    "prefix": prefix,
    "share": share,
    "submit": submit,
    "tiers": tiers,
    "ttft": ttft,
}
WRONG_BYTES, FAILED = 1, 2  # exit statuses


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    parser.add_argument("name", choices=[*sorted(QUESTIONS), "all"], help="the question")
    parser.add_argument("--device", default="auto", help="auto, host, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it works, not how fast")
    parser.add_argument("--out", type=Path, default=Path("perf/results"), help="folder of the JSON and the picture")
    own = _own_options(parser)
    arguments = parser.parse_args(argv)
    for name, options in own.items():
        if name != arguments.name and (given := [option for option in options if getattr(arguments, option) is not None]):
            parser.error(f"--{given[0]} is for {name} alone")
    arguments.own = own
    if arguments.name != "all":
        return _answer(arguments.name, QUESTIONS[arguments.name], arguments)
    return _answer_all(arguments)


def _own_options(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Adds the options of questions that have some, None where they are not given; their names by question."""
    found = {}
    for name, module in QUESTIONS.items():
        if hasattr(module, "add_options"):
            group = parser.add_argument_group(f"options of {name}")
            module.add_options(group)
            found[name] = [action.dest for action in group._group_actions]
    return found


def _answer_all(arguments: argparse.Namespace) -> int:
    """Every question, whatever becomes of the others; the worst of their exit statuses."""
    statuses = {}
    for at, (name, module) in enumerate(QUESTIONS.items(), 1):
        progress(f"[{at}/{len(QUESTIONS)}] {name}")
        print(f"\n{name}")
        try:
            statuses[name] = _answer(name, module, arguments)
        except Exception as error:  # of a library that a measurement uses, say: the other questions can still be answered
            print(f"perf: {name}: {told(error)}", file=sys.stderr)
            statuses[name] = FAILED
    if failed := [name for name, status in statuses.items() if status]:
        print(f"perf: {len(failed)} of {len(statuses)} questions failed: {', '.join(failed)}", file=sys.stderr)
    return max(statuses.values())


def _answer(name: str, module: ModuleType, arguments: argparse.Namespace) -> int:
    try:
        check_writable(arguments.out)
        own = {"options": arguments} if name in arguments.own else {}
        device_name, rows, notes = module.measure(arguments.device, quick=arguments.quick, **own)
    except KVortexError as error:
        print(f"perf: {error}", file=sys.stderr)
        return FAILED
    command = _command(name, arguments)
    report = Report(name, command, environment(device_name), notes, rows, module.KEYS, module.BETTER)
    print(report.table(module.COLUMNS))
    for method, how in notes.get("methods", {}).items():
        print(f"{method}: {how}")
    try:
        for path in report.write(arguments.out, module.draw):
            print(f"wrote {path}")
    except OSError as error:  # the disk may have filled up since
        print(f"perf: --out {arguments.out}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    for part, why in notes.get("failed", {}).items():
        print(f"perf: {part}: {why}", file=sys.stderr)
    if report.wrong_bytes:
        print(f"perf: {report.wrong_bytes} bytes were wrong; see the column wrong_bytes", file=sys.stderr)
        return WRONG_BYTES
    return FAILED if notes.get("failed") else 0


def _command(name: str, arguments: argparse.Namespace) -> str:
    """What repeats the measurement; where its result was put is nobody else's business."""
    quick = ["--quick"] if arguments.quick else []
    given = {option: getattr(arguments, option) for option in arguments.own.get(name, ())}
    each = {option: value if isinstance(value, list) else [value] for option, value in given.items()}
    own = [f"--{option} {value}" for option, values in each.items() for value in values if isinstance(value, str | int | float)]
    return " ".join(["python -m perf", name, "--device", arguments.device, *quick, *own])


if __name__ == "__main__":
    sys.exit(main())
