"""A floor imports only floors below it, and no room imports an array library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The table of docs/architecture.md. A module of kvortex/ that is no room here has no place in the house yet.
FLOORS = {
    "errors": 0,
    "config": 0,
    "jit": 0,
    "kernels": 0,
    "arguments": 1,
    "devices": 1,
    "memory": 2,
    "layout": 2,
    "codecs": 2,
    "digests": 2,
    "transfer": 3,
    "keys": 4,
    "index": 4,
    "tiers": 5,
    "traces": 5,
    "calls": 6,
    "coding": 6,
    "opening": 6,
    "issuing": 6,
    "stats": 6,
    "flight": 6,
    "parts": 6,
    "engine": 6,
    "cli": 7,
    "integrations": 7,
    "__main__": 8,
}
FRONT_DOOR = ""  # kvortex/__init__.py shows floors 0 to 6; commands and connectors come in by it
# Rooms of one floor that lean on each other, one way.
_ENGINE = ("calls", "coding", "flight", "issuing", "opening", "parts", "stats")
NEIGHBOURS = {("config", "errors"), ("kernels", "errors"), ("devices", "arguments"), ("index", "keys"), ("flight", "stats")} | {
    *(("engine", part) for part in _ENGINE),
    *(("parts", part) for part in ("flight", "stats")),
    ("issuing", "parts"),
    ("coding", "issuing"),
    ("calls", "engine"),  # for type checkers alone
}
FOREIGN = {"torch", "cupy", "jax"}


def modules(root: Path) -> Iterator[tuple[str, Path, bool]]:
    """Dotted name, file and whether it is a package, of every module that an installation of ``root`` would have."""
    for folder, package in ((root / "kvortex", "kvortex"), (root / "kernels", "kvortex.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            yield ".".join((package, *(parts[:-1] if is_package else parts))), path, is_package


def imports(path: Path, name: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a module imports: at its top, in functions, for type checkers, by ``importlib``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if is_package else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def room(name: str) -> str:
    """The room of a dotted name in kvortex: ``kvortex.devices.host`` is in ``devices``."""
    part = name.split(".")[1:2]
    if not part or part[0] in ("__version__", "__all__"):
        return FRONT_DOOR
    # ``from kvortex import KVLayout`` and ``import kvortex`` come in by the front door
    return part[0] if part[0] in FLOORS else FRONT_DOOR


def problems(root: Path) -> list[str]:
    """Every import that breaks a rule, as ``file:line: what``."""
    found = []
    for name, path, is_package in modules(root):
        where = path.relative_to(root)
        home = room(name)
        if home == FRONT_DOOR and name != "kvortex":
            found.append(f"{where}:1: {name} is on no floor")
            continue
        for line, target in imports(path, name, is_package):
            top = target.partition(".")[0]
            if top == "kernels":
                found.append(f"{where}:{line}: import kvortex.kernels, not kernels")
            elif top in FOREIGN and home != "integrations":
                found.append(f"{where}:{line}: {home} imports {top}")
            elif top == "kvortex" and not allowed(home, target):
                found.append(f"{where}:{line}: {home or 'the front door'} imports {target}")
    return found


def allowed(home: str, target: str) -> bool:
    """Whether a module of the room ``home`` may import the dotted name ``target``."""
    there = room(target)
    if target == "kvortex.__version__" or there == home:
        return True
    if home == FRONT_DOOR:
        return FLOORS[there] <= 6
    if there == FRONT_DOOR:
        return FLOORS[home] >= 7
    return FLOORS[there] < FLOORS[home] or (home, there) in NEIGHBOURS


def test_every_module_imports_only_what_lies_below_it() -> None:
    names = [name for name, _, _ in modules(ROOT)]
    assert "kvortex.config" in names
    assert problems(ROOT) == []


BAD = [
    ("kvortex/devices/bad.py", "import kvortex.memory.arena", "devices imports kvortex.memory.arena"),
    ("kvortex/devices/bad.py", "from kvortex import layout", "devices imports kvortex.layout"),
    ("kvortex/devices/bad.py", "from ..transfer import plan", "devices imports kvortex.transfer.plan"),
    ("kvortex/devices/__init__.py", "from ..transfer import plan", "devices imports kvortex.transfer.plan"),
    ("kvortex/devices/bad.py", "from .. import engine", "devices imports kvortex.engine"),
    ("kvortex/memory/bad.py", "import kvortex", "memory imports kvortex"),
    ("kvortex/memory/bad.py", "from kvortex import KVLayout", "memory imports kvortex.KVLayout"),
    ("kvortex/memory/bad.py", "import kvortex.layout", "memory imports kvortex.layout"),
    ("kvortex/config.py", "def f():\n    from kvortex.devices import host", "config imports kvortex.devices.host"),
    ("kvortex/keys.py", "import kvortex.index", "keys imports kvortex.index"),
    ("kvortex/engine.py", "import kvortex.cli", "engine imports kvortex.cli"),
    ("kvortex/index/bad.py", "if TYPE_CHECKING:\n    import kvortex.engine", "index imports kvortex.engine"),
    ("kvortex/index/bad.py", "import importlib as i\ni.import_module('kvortex.engine')", "index imports kvortex.engine"),
    ("kvortex/__init__.py", "from kvortex.cli import main", "the front door imports kvortex.cli.main"),
    ("kvortex/layout/bad.py", "def f():\n    import torch", "layout imports torch"),
    ("kvortex/layout/bad.py", "from cupy.cuda import Stream", "layout imports cupy"),
    ("kvortex/cli/bad.py", "__import__('jax.numpy')", "cli imports jax"),
    ("kernels/bad.py", "from kvortex.devices import base", "kernels imports kvortex.devices.base"),
    ("kernels/bad.py", "from kernels import lane", "import kvortex.kernels, not kernels"),
    ("kvortex/attic.py", "", "kvortex.attic is on no floor"),
]


@pytest.mark.parametrize(("file", "code", "message"), BAD, ids=[message for _, _, message in BAD])
def test_a_planted_bad_import_is_caught(tmp_path: Path, file: str, code: str, message: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    found = problems(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{file}:") and found[0].endswith(f": {message}")


GOOD = [
    ("kvortex/engine.py", "from kvortex import __version__, devices\nfrom kvortex.stats import Counters\nimport kvortex.tiers"),
    ("kvortex/devices/cuda.py", "from . import base\nfrom kvortex.devices.host import x\nfrom kvortex.kernels import build"),
    ("kvortex/cli/demo.py", "import kvortex\nfrom kvortex import KVLayout\nfrom . import table"),
    ("kvortex/integrations/vllm/connector.py", "import torch\nfrom kvortex.engine import KVortexEngine"),
    ("kernels/build.py", "from kvortex.errors import BuildError\nfrom kvortex.kernels import lane\nimport numpy, numba.cuda"),
]


@pytest.mark.parametrize(("file", "code"), GOOD, ids=[file for file, _ in GOOD])
def test_good_imports_pass(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert problems(tmp_path) == []
