"""What a person sees, with and without rich, on a terminal and off it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from kvortex.cli import console


class Screen(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


Screens = Callable[[bool], tuple[Screen, Screen]]


@pytest.fixture
def screens(monkeypatch: pytest.MonkeyPatch) -> Screens:
    """Puts what may be terminals in the place of stdout and stderr, once the test itself runs: pytest's own come before."""

    def put(terminal: bool) -> tuple[Screen, Screen]:
        out, err = Screen(terminal), Screen(terminal)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        for name, value in (("TERM", "xterm"), ("COLUMNS", "80"), ("NO_COLOR", "1")):
            monkeypatch.setenv(name, value)
        return out, err

    return put


ROWS = [("one", "1 [bold]"), ("twenty-two", "[/]")]
PLAIN = "a title\n  one         1 [bold]\n  twenty-two  [/]\n"


def test_table_on_a_terminal_with_rich(screens: Screens) -> None:
    pytest.importorskip("rich")
    out, err = screens(True)
    console.table("a title", ROWS)
    assert out.getvalue() != PLAIN and err.getvalue() == ""
    for word in ("a title", "one", "1 [bold]", "twenty-two", "[/]"):  # brackets are no markup
        assert word in out.getvalue()


def test_table_on_a_terminal_without_rich(screens: Screens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    out, _ = screens(True)
    console.table("a title", ROWS)
    assert out.getvalue() == PLAIN


def test_table_off_a_terminal_is_plain(screens: Screens) -> None:
    out, _ = screens(False)
    console.table("a title", ROWS)
    console.table("empty", [])
    assert out.getvalue() == PLAIN + "empty\n"


GRID = ("a title", ["name", "10", "2000"], [["[a]", "1.5%", "20%"], ["longer", "[/]", "3%"]])


def test_columns_off_a_terminal(screens: Screens) -> None:
    out, _ = screens(False)
    console.grid(*GRID)
    console.table("", [("a", "b")])
    assert out.getvalue() == "a title\n  name      10  2000\n  [a]     1.5%   20%\n  longer   [/]    3%\n  a  b\n"


def test_columns_on_a_terminal(screens: Screens) -> None:
    pytest.importorskip("rich")
    out, _ = screens(True)
    console.grid(*GRID)
    console.table("", [("a", "b")])
    for word in ("a title", "2000", "[a]", "20%", "longer", "[/]"):
        assert word in out.getvalue()
    assert "━" in out.getvalue()


def test_bar_on_a_terminal(screens: Screens) -> None:
    pytest.importorskip("rich")
    out, err = screens(True)
    with console.Progress("steps", 3) as progress:
        for at in range(3):
            progress.advance(f"detail {at}")
    assert "detail 2" in err.getvalue() and out.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_now_and_then(screens: Screens, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out, err = screens(terminal)
    with console.Progress("steps", 12) as progress:
        for _ in range(12):
            now[0] += 1
            progress.advance("well" if now[0] > 107 else "")
    assert err.getvalue() == "5 of 12 steps\n10 of 12 steps: well\n" and out.getvalue() == ""


def test_amounts() -> None:
    amounts = [console.amount(n) for n in (0, 999, 1000, 16384, 2_500_000, 3_210_000_000, 5e12)]
    assert amounts == ["0 bytes", "999 bytes", "1.00 KB", "16.38 KB", "2.50 MB", "3.21 GB", "5000.00 GB"]
