"""The Python examples of the README and of the docs run as they stand, in order, on the host device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def examples(text: str) -> list[str]:
    """The ``python`` blocks of a Markdown text, each padded so that a traceback shows the text's line numbers."""
    return ["\n" * text.count("\n", 0, found.start(1)) + found[1] for found in BLOCK.finditer(text)]


def test_extractor_takes_python_blocks_only() -> None:
    text = "a\n```python\nx = 1\n```\n```bash\nexit\n```\n\n```python\nassert x\n```\n"
    assert examples(text) == ["\n\nx = 1\n", "\n" * 9 + "assert x\n"]


def test_examples_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("KVORTEX_DEVICE", "KVORTEX_CPU_POOL_SIZE_BYTES"):
        monkeypatch.delenv(name, raising=False)
    found = examples(README.read_text(encoding="utf-8"))
    assert found, "README.md shows no example"
    scope: dict[str, Any] = {"__name__": "__main__"}
    for example in found:
        exec(compile(example, str(README), "exec"), scope)
    assert 0 <= float(capsys.readouterr().out.split()[-1]) <= 1
    assert scope["keys"].shape == (62, 32)
    assert not scope["hits"].any()


def test_examples_of_keys_run() -> None:
    path = README.parent / "docs" / "keys.md"
    scope: dict[str, Any] = {"__name__": "__main__"}
    for example in examples(path.read_text(encoding="utf-8")):
        exec(compile(example, str(path), "exec"), scope)
    assert scope["keys"].shape == scope["hashes"].shape == (4, 32) and scope["new"].shape == (1, 32)


def test_examples_of_codecs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # one writes a file
    path = README.parent / "docs" / "codecs.md"
    scope: dict[str, Any] = {"__name__": "__main__"}
    found = examples(path.read_text(encoding="utf-8"))
    assert found, "docs/codecs.md shows no example"
    for example in found:
        exec(compile(example, str(path), "exec"), scope)
    assert (scope["sizes"] > 0).all()
