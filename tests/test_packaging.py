"""What is installed is what is there, and what the README says is what CI runs."""

from __future__ import annotations

import ast
import configparser
import fnmatch
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

import kvortex

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    assert parser.read(ROOT / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_what_is_tested_is_this_checkout() -> None:
    """And not the kernels of another one that is installed."""
    for name, folder in (("kvortex", ROOT / "kvortex"), ("kvortex.kernels", ROOT / "kernels")):
        module = importlib.import_module(name)
        assert Path(str(module.__file__)).resolve().parent == folder


def packages_in_tree() -> list[str]:
    found = []
    for folder, package in ((ROOT / "kvortex", "kvortex"), (ROOT / "kernels", "kvortex.kernels")):
        for init in folder.rglob("__init__.py"):
            found.append(".".join((package, *init.parent.relative_to(folder).parts)))
    return sorted(found)


def test_every_package_is_installed(setup_cfg: configparser.ConfigParser) -> None:
    assert lines(setup_cfg["options"]["packages"]) == packages_in_tree()


def test_every_folder_of_modules_is_a_package() -> None:
    for top in (ROOT / "kvortex", ROOT / "kernels"):
        for folder in {path.parent for path in top.rglob("*.py")}:
            assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py"


def test_kernels_are_mapped_into_the_package(setup_cfg: configparser.ConfigParser) -> None:
    folders = lines(setup_cfg["options"]["package_dir"])
    assert folders == ["kvortex = kvortex", "kvortex.kernels = kernels"]
    spec = importlib.util.find_spec("kvortex.kernels")
    assert spec is not None and spec.origin is not None
    assert os.path.samefile(spec.origin, ROOT / "kernels" / "__init__.py")


def test_version_is_written_once(setup_cfg: configparser.ConfigParser) -> None:
    assert setup_cfg["metadata"]["version"] == "attr: kvortex.__version__"
    assignments = [
        node.value.value
        for node in ast.parse((ROOT / "kvortex" / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert assignments == [kvortex.__version__]
    assert f"{kvortex.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^version\s*=", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M) is None


def test_installed_version_is_that_of_the_source() -> None:
    try:
        installed = importlib.metadata.version("kvortex")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kvortex is not installed; the tests run from the checkout")
    assert installed == kvortex.__version__


def test_type_marker_is_installed(setup_cfg: configparser.ConfigParser) -> None:
    assert (ROOT / "kvortex" / "py.typed").exists()
    assert "py.typed" in setup_cfg["options.package_data"]["kvortex"]


def test_console_script_exists(setup_cfg: configparser.ConfigParser) -> None:
    (script,) = lines(setup_cfg["options.entry_points"]["console_scripts"])
    name, target = re.split(r"\s*=\s*", script)
    module, function = target.split(":")
    assert name == "kvortex"
    assert callable(getattr(importlib.import_module(module), function))


def test_readme_commands_are_what_ci_runs() -> None:
    """Command 1 installs and runs the demo, command 2 installs the test extra and runs the tests."""
    readme, ci = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = re.findall(r"^```bash\n(.*?)^```", readme, re.M | re.S)
    assert commands[0].strip() == 'python3 -m venv .venv && .venv/bin/pip install -e ".[cli]" && .venv/bin/kvortex demo'
    assert commands[1].strip() == '.venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest'
    for step in ("pip install", '-e ".[test]"', "python -m pytest"):
        assert step in ci, f".ci/run does not run {step!r}"


def test_readme_names_every_option_and_extra(setup_cfg: configparser.ConfigParser) -> None:
    from kvortex.config import _FIELDS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for option in _FIELDS:
        assert f"`{option}`" in readme, f"README.md does not explain {option}"
    for extra in setup_cfg["options.extras_require"]:
        assert f"`{extra}`" in readme or f"[{extra}" in readme, f"README.md does not name the extra {extra}"


def test_ci_script_can_be_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\nset -euo pipefail\n")


def tracked_files() -> list[str]:
    """Files that git knows, or a reason to skip."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip(f"git refuses: {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if name]


def outside(manifest: str, files: list[str]) -> list[str]:
    """Files that a source distribution would lack, by the commands of a MANIFEST.in in their order."""
    taken: set[str] = {"MANIFEST.in"}
    for command, *patterns in (line.split() for line in lines(manifest)):
        match = {
            "include": lambda name, pattern: name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern),
            "graft": lambda name, pattern: name.startswith(f"{pattern}/"),
            "global-exclude": lambda name, pattern: fnmatch.fnmatchcase(name.rpartition("/")[2], pattern),
        }[command]
        found = {name for name in files if any(match(name, pattern) for pattern in patterns)}
        taken = taken - found if command == "global-exclude" else taken | found
    return sorted(set(files) - taken)


def test_a_source_distribution_is_the_whole_checkout() -> None:
    assert outside((ROOT / "MANIFEST.in").read_text(encoding="utf-8"), tracked_files()) == []


def test_what_a_manifest_leaves_out_is_seen() -> None:
    manifest = "# all\ninclude *.md a.py\ngraft docs\nglobal-exclude *.nbi"
    files = ["README.md", "a.py", "b.py", "docs/deep/c.md", "docs/c.nbi", "tests/README.md", "docs.py", "MANIFEST.in"]
    assert outside(manifest, files) == ["b.py", "docs.py", "docs/c.nbi", "tests/README.md"]


def test_no_hint_asks_a_package_index_for_kvortex() -> None:
    """None has it: what installs an extra is the checkout."""
    files = [path for folder in ("kvortex", "kernels", "perf", "docs") for path in (ROOT / folder).rglob("*.*")]
    for path in [*files, ROOT / "README.md"]:
        if path.suffix in (".py", ".md"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"pip install[^\n]*kvortex(\[|$)", text, re.M), path
