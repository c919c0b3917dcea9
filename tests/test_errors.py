"""How messages show what was seen: short, printable, and without help from the value itself."""

from __future__ import annotations

import numpy as np
import pytest

from kvortex.errors import cut, shown, told


class Bad:
    def __repr__(self) -> str:
        raise KeyError("no")


class BadError(Exception):
    def __str__(self) -> str:
        raise KeyError("no")


class Odd:
    def __repr__(self) -> str:
        return "\udc80" * 1000


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, b"x" * 10**7, bytearray(10**7), 10**5000, -(10**5000), [0] * 10**6, ("y" * 10**6,) * 50, {1: "z" * 10**6},
     np.zeros(10**6), Odd(), type("T" * 10**6, (), {}), type("T" * 10**6, (), {"__repr__": Bad.__repr__})()],
    ids=lambda value: type(value).__name__[:20],
)  # fmt: skip
def test_no_value_fills_a_log(value: object) -> None:
    assert 0 < len(shown(value).encode()) < 700 and len(told(Exception(value)).encode()) < 1500


@pytest.mark.parametrize("value", [1, "a", b"a", (1, 2), [None, True], 1.5, None, int, {"a": 1}, "x" * 90])
def test_short_ones_are_shown_as_they_are(value: object) -> None:
    assert shown(value) == repr(value)


def test_what_cannot_be_shown_is_named() -> None:
    assert "Bad" in shown(Bad()) and "Bad" in shown([Bad()])
    assert told(BadError()) == "BadError" and told(KeyError("x")) == "KeyError: 'x'"
    assert shown(1 << 999) == "<int of 1000 bits>"


def test_arrays_take_one_line() -> None:
    assert shown(np.eye(2)) == "array([[1., 0.], [0., 1.]])"


def test_both_ends_stay() -> None:
    text = cut("a" * 500 + "b" * 500)
    assert text.startswith("aaa") and text.endswith("bbb") and len(text) == 100 and "..." in text
    assert shown("\udc80") == r"'\udc80'" and cut("\udc80") == r"\udc80"
