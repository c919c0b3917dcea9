"""The ``kvortex`` command. What a command needs is imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import IO

from kvortex import __version__
from kvortex.config import parse_size
from kvortex.errors import KVortexError, shown

_MOST = 2**63 - 1
_DEVICE_HELP = "auto (the first GPU if there is one, else the host), host, cuda or cuda:N; default auto"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Parameters
    ----------
    argv
        Arguments without the program's name; None for ``sys.argv[1:]``.

    Returns
    -------
    int
        0: well. 1: wrong or lost bytes were found. 2: it could not run, and one line on stderr says why. 130: Ctrl-C.
    """
    try:
        return _guarded(argv)
    finally:
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
        except (OSError, ValueError):  # it was full, or somebody has closed it, and nothing has ended for that
            _drop(sys.stderr)


def _guarded(argv: Sequence[str] | None) -> int:
    """The exit status, whatever happens."""
    if sys.stdout is None:  # as Python puts it where the descriptor was closed
        return _refusal("stdout is closed; send it to a file, or to /dev/null")
    try:
        code = _code(argv)
        sys.stdout.flush()  # here, where an error can still be told
        return code
    except KeyboardInterrupt:
        _refusal("interrupted")
        return 130
    except KVortexError as error:
        return _refusal(" ".join(str(error).splitlines()))  # a tool chain's message may have several lines
    except MemoryError as error:
        return _refusal(f"not enough memory: {error}")
    except BrokenPipeError:  # the reader of a pipe has seen enough
        _drop(sys.stdout)
        return 2
    except OSError as error:
        _drop(sys.stdout)
        return _refusal(f"{error.filename or 'output'}: {error.strerror or error}")
    except Exception:  # a mistake of ours, which must not look like wrong bytes
        traceback.print_exc()
        return 2


def _code(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed what there is to say
        return stop.code if isinstance(stop.code, int) else 2
    arguments.command_line = ["kvortex", *(sys.argv[1:] if argv is None else argv)]
    return _run(arguments)


def _refusal(text: str) -> int:
    """One line on stderr, where it takes one, and the code that goes with it."""
    if sys.stderr is not None:  # else print() would write to stdout
        with contextlib.suppress(OSError):
            print(f"kvortex: {text}", file=sys.stderr, flush=True)
    return 2


def _drop(stream: IO[str]) -> None:
    """What it still holds goes nowhere: Python would try to write it once more at exit, and make 120 of the exit status."""
    with contextlib.suppress(OSError):  # a test's stdout has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "demo":
        from kvortex.cli import demo

        return demo.run(arguments)
    if arguments.command == "replay":
        from kvortex.cli import replay

        return replay.run(arguments)
    if arguments.command == "record":
        from kvortex.cli import record

        return record.run(arguments)
    if arguments.command == "calibrate" and (arguments.tables or arguments.sample):
        from kvortex.cli import tables

        return tables.run(arguments)
    if arguments.command == "calibrate":
        from kvortex.cli import calibrate

        return calibrate.run(arguments)
    if arguments.command == "tier":
        from kvortex.cli import tier

        return tier.run(arguments)
    from kvortex.cli import doctor

    return doctor.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvortex", description="Moves paged KV-cache blocks between VRAM and pinned RAM, as fast as the link allows."
    )
    parser.add_argument("--version", action="version", version=f"kvortex {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_replay(commands)
    _add_record(commands)
    _add_doctor(commands)
    _add_calibrate(commands)
    _add_tier(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "A synthetic multi-turn chat on a paged KV cache: blocks are saved, evicted, found and loaded, every byte verified."
    demo = commands.add_parser("demo", help="save, evict and load blocks of a synthetic chat", description=about)
    demo.add_argument("--device", default="auto", help=_DEVICE_HELP)
    demo.add_argument("--turns", type=_count, default=16, metavar="N", help="turns of each conversation; default 16")
    demo.add_argument("--conversations", type=_count, default=8, metavar="N", help="taken in turn; default 8")
    demo.add_argument("--system-tokens", type=_count, default=1024, metavar="N",
                      help="length of the system prompt that all conversations share; default 1024")
    demo.add_argument("--pool-blocks", type=_count, metavar="N",
                      help="blocks that the pool in RAM holds; default: three quarters of what the chat makes; then it evicts")
    demo.add_argument("--seconds", type=_seconds, default=20.0, metavar="S",
                      help="begin no turn after this time; default 20")
    demo.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the messages; the same seed, the same chat")


def _add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = (
        "Plays a trace of requests in the Mooncake format: a JSON object a line with timestamp, input_length, output_length "
        "and hash_ids, one id for each 512 tokens of the prompt (or as many as the line's block_size says, as in what kvortex "
        "records). For each request the leading blocks that are in the pool are loaded and verified byte by byte, and the "
        "others are saved. Several policies and pool sizes are played one after the other, each on an empty pool, and "
        "Belady's bound is told beside them: hits that no policy can exceed."
    )
    replay = commands.add_parser("replay", help="play a recorded trace of requests", description=about)
    replay.add_argument("trace", metavar="TRACE.jsonl")
    replay.add_argument("--limit", type=_count, metavar="N", help="only the first N requests")
    replay.add_argument("--policy", metavar="NAME[,NAME...]",
                        help="which blocks are evicted; all for every policy that there is; default lru")
    replay.add_argument("--admit-after", type=_counts, metavar="N[,N...]",
                        help="blocks are stored at the n-th offer, 1 to 255; default 1")
    replay.add_argument("--pool-blocks", "--blocks", type=_counts, metavar="N[,N...]",
                        help="blocks that the pool holds; default 3000")
    replay.add_argument("--no-data", action="store_true",
                        help="only the index: no device, no memory for a pool, no bytes; the same hits, much sooner")
    replay.add_argument("--record-bytes", type=_size, metavar="SIZE",
                        help="bytes that stand for one block, a multiple of 1 KiB; default 16KiB. The longest request of "
                        "the trace must fit in the device's memory at this size")
    replay.add_argument("--device", help=_DEVICE_HELP)
    replay.add_argument("--json", metavar="FILE", help="write the numbers, and of a single run the hits of each request; - for "
                        "stdout")
    replay.add_argument("--plot", metavar="FILE.png", help="draw hit rates against pool sizes; needs the plot extra")


def _add_record(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = (
        "Runs a program, and records for every kvortex engine in it, or in processes that it starts, which blocks are asked "
        "for: a trace that kvortex replay takes back. Keys are written as small integers, tokens and data not at all. The "
        "first engine writes TRACE.jsonl, others TRACE-2.jsonl and so on. The program is as it was, but for the environment "
        "variable KVORTEX_RECORD_TRACE; engine.record(path) does the same from inside. Exits as the program does, with 2 "
        "where it cannot be run or makes no engine."
    )
    record = commands.add_parser("record", help="record a trace of what engines are asked for", description=about,
                                 usage="kvortex record [-h] TRACE.jsonl -- PROGRAM [ARGUMENT ...]")
    record.add_argument("trace", metavar="TRACE.jsonl", help="a file that is not there yet")
    record.add_argument("program", metavar="PROGRAM", nargs=argparse.REMAINDER, help="and its arguments")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "What this machine has, what kvortex would run on it, and what is missing with the command that cures it."
    doctor = commands.add_parser("doctor", help="say what is here, what would run and what is missing", description=about)
    doctor.add_argument("--json", action="store_true", help="as JSON on stdout")
    doctor.add_argument("--build", action="store_true", help="also compile the kernels, for this GPU or else for 9.0")


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = (
        "Measures in a few seconds how fast blocks cross the link by each route, with the GPU idle and beside a computation, "
        "and keeps what that says for all engines on GPUs of this kind. Best while nothing else runs on the GPU."
    )
    calibrate = commands.add_parser("calibrate", help="measure which route serves which transfer best", description=about)
    calibrate.add_argument("--device", default="auto", help=_DEVICE_HELP)
    calibrate.add_argument("--json", action="store_true", help="all measurements as JSON on stdout")
    calibrate.add_argument("--tables", metavar="FILE",
                           help="measure nothing; instead write what codecs learn from --sample, for the option codec_tables")
    calibrate.add_argument("--sample", nargs="+", metavar="NPY",
                           help="files of numpy.save, a sequence each: (layers, 2, tokens, heads, head_dim) of bf16, as uint16 "
                                "or float32, or (layers, tokens, width) of a latent")
    calibrate.add_argument("--order", choices=("NHD", "HND"), default="NHD",
                           help="in the cache's pages a token's heads lie side by side, or a head's tokens; default NHD")
    calibrate.add_argument("--block-size", type=_count, default=16, metavar="N", help="tokens in a block; default 16")
    calibrate.add_argument("--skip", type=_natural, default=16, metavar="N",
                           help="tokens at the beginning of each file that are left out; default 16")


def _add_tier(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = (
        "Looks into a tier below RAM without an engine. ls: what is there. verify: reads every record and checks it; exits "
        "with 1 where one is not what was stored. purge: removes every record."
    )
    tier = commands.add_parser("tier", help="look into a tier below RAM, verify it, or empty it", description=about)
    tier.add_argument("action", choices=("ls", "verify", "purge"))
    tier.add_argument("url", metavar="URL", help="as in KVORTEX_TIERS: disk:/folder, redis://host:6379/0, s3://bucket/prefix")
    tier.add_argument("--yes", action="store_true", help="of purge: that it is meant")
    tier.add_argument("--json", action="store_true", help="as JSON on stdout")


def _count(text: str) -> int:
    """For argparse, whose own messages show the names of these functions."""
    return _integer(text, at_least=1)


def _counts(text: str) -> list[int]:
    """Several, different ones."""
    values = [_count(part.strip()) for part in text.split(",")]
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{shown(text)} names a number twice")
    return values


def _natural(text: str) -> int:
    return _integer(text, at_least=0)


def _integer(text: str, at_least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = at_least - 1
    if value < at_least:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no integer of at least {at_least}")
    if value > _MOST:
        raise argparse.ArgumentTypeError(f"{shown(text)} is too large: {_MOST} at most")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no number of seconds above 0")
    return value


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except KVortexError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
