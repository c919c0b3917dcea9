"""``python -m perf NAME``: measures, prints a table, writes JSON and a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvortex.errors import KVortexError
from perf import compute, fragments, latency
from perf.report import Report, check_writable, environment

QUESTIONS = {"compute": compute, "fragments": fragments, "latency": latency}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    parser.add_argument("name", choices=sorted(QUESTIONS), help="the question")
    parser.add_argument("--device", default="auto", help="auto, host, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it works, not how fast")
    parser.add_argument("--out", type=Path, default=Path("perf/results"), help="folder of the JSON and the picture")
    arguments = parser.parse_args(argv)
    module = QUESTIONS[arguments.name]
    try:
        check_writable(arguments.out)
        device_name, rows, notes = module.measure(arguments.device, quick=arguments.quick)
    except KVortexError as error:
        print(f"perf: {error}", file=sys.stderr)
        return 2
    report = Report(arguments.name, _command(arguments), environment(device_name), notes, rows)
    print(report.table(module.COLUMNS))
    try:
        for path in report.write(arguments.out, module.draw):
            print(f"wrote {path}")
    except OSError as error:  # the disk may have filled up since
        print(f"perf: --out {arguments.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def _command(arguments: argparse.Namespace) -> str:
    """What repeats the measurement; where its result was put is nobody else's business."""
    quick = ["--quick"] if arguments.quick else []
    return " ".join(["python -m perf", arguments.name, "--device", arguments.device, *quick])


if __name__ == "__main__":
    sys.exit(main())
