"""What a person sees: progress on stderr, tables on stdout; by rich on a terminal where rich is installed."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any

_LINE_EVERY_S = 5.0  # a log file wants to know that something happens, and not much more


def _rich(module: str, stream: IO[str] | None) -> Any:
    """A module of rich, or None where it is not installed or ``stream`` is no terminal: what is piped stays plain."""
    if stream is None or not stream.isatty():
        return None
    try:
        importlib.import_module("rich")
        return importlib.import_module(f"rich.{module}")
    except ImportError:
        return None


class Progress:
    """How far a command is, on stderr: a bar that vanishes at the end, or without a terminal a line every five seconds.

    Parameters
    ----------
    what
        In a few words.
    total
        Steps.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._next_line = time.monotonic() + _LINE_EVERY_S
        self._bar: Any = None
        progress, console = _rich("progress", sys.stderr), _rich("console", sys.stderr)
        if progress is not None and console is not None:
            self._bar = progress.Progress(console=console.Console(file=sys.stderr), transient=True)
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, detail: str = "") -> None:
        """One step more, and what to say of it."""
        self._done += 1
        text = f"{self._what}: {detail}" if detail else self._what
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=text)
        elif time.monotonic() >= self._next_line:
            note(f"{self._done} of {self._total} {text}")
            self._next_line = time.monotonic() + _LINE_EVERY_S


def note(text: str) -> None:
    """One line on stderr. Where that is closed or full, the work goes on without it."""
    if sys.stderr is not None:  # else print() would write to stdout
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def aside(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """As :func:`table`, on stderr: stdout is another program's. Where that is closed or full, the work goes on without it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            table(title, rows, sys.stderr)


def table(title: str, rows: Sequence[tuple[str, str]], stream: IO[str] | None = None) -> None:
    """Names and values on ``stream``, by default stdout; without a title where that is empty."""
    stream = sys.stdout if stream is None else stream
    rich_table, console, text = (_rich(module, stream) for module in ("table", "console", "text"))
    if rich_table is None:
        width = max((len(name) for name, _ in rows), default=0)
        lines = [*([title] if title else []), *(f"  {name:<{width}}  {value}" for name, value in rows)]
        print(*lines, sep="\n", file=stream, flush=True)
        return
    heading = text.Text(title, "bold") if title else None
    grid = rich_table.Table(title=heading, title_justify="left", show_header=False)
    for name, value in rows:
        grid.add_row(text.Text(name, "cyan"), text.Text(value))  # Text, so that brackets in a value are no markup
    console.Console(file=stream).print(grid)


def grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns under their names on stdout: the first to the left, the others, which are numbers, to the right."""
    rich_table, console, text = (_rich(module, sys.stdout) for module in ("table", "console", "text"))
    if rich_table is None:
        lines = [columns, *rows]
        widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
        print(title, flush=True)
        for first, *others in lines:
            numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            print(" ", "  ".join([first.ljust(widths[0]), *numbers]), flush=True)
        return
    drawn = rich_table.Table(title=text.Text(title, "bold"), title_justify="left")
    for at, column in enumerate(columns):
        drawn.add_column(text.Text(column), justify="left" if at == 0 else "right", no_wrap=True)
    for first, *others in rows:
        drawn.add_row(text.Text(first, "cyan"), *map(text.Text, others))
    console.Console(file=sys.stdout).print(drawn)


def amount(nbytes: float) -> str:
    """Bytes in the unit that suits: ``"1.50 GB"``."""
    for unit in ("bytes", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} bytes" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
