"""Results are compared row by row, and files that do not belong together or are none are refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvortex.errors import ArgumentError
from perf import compare
from perf.report import ROOT

GPU = {"device": "cuda:0", "gpu": "A GPU", "driver": "580.1"}
RESULT: dict[str, Any] = {
    "name": "fragments",
    "command": "python -m perf fragments --device cuda",
    "environment": {"device": GPU},
    "notes": {},
    "rows": [
        {"fragment_kib": 4, "method": "kvortex", "save": 50.0, "wait_us": 100.0, "wrong_bytes": 0},
        {"fragment_kib": 32, "method": "kvortex", "save": 54.0, "wait_us": 90.0, "wrong_bytes": 0},
    ],
    "keys": ["fragment_kib", "method"],
    "better": {"save": "higher", "wait_us": "lower"},
}


def written(path: Path, **changed: Any) -> Path:
    path.write_text(json.dumps(RESULT | changed))
    return path


def rows(**changed: Any) -> list[dict[str, Any]]:
    """Rows of the result, the second one changed."""
    found = copy.deepcopy(RESULT["rows"])
    found[1] |= changed
    return found


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return written(tmp_path / "a.json")


def test_ratios_are_above_1_where_b_is_better(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.json", rows=rows(save=27.0, wait_us=45.0))
    found = {(change.row, change.figure): change.ratio for change in compare.changes(compare.read(a), compare.read(b))}
    assert found == {((4, "kvortex"), "save"): 1, ((4, "kvortex"), "wait_us"): 1} | {
        ((32, "kvortex"), "save"): 0.5,
        ((32, "kvortex"), "wait_us"): 2,
    }


def test_what_got_worse_is_flagged_beyond_the_tolerance(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = written(tmp_path / "b.json", rows=rows(save=50.0, wait_us=92.0))
    assert compare.main([str(a), str(b)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["fragment_kib", "method", "figure", "A", "B", "ratio"]
    assert [line.split() for line in lines[3:]] == [
        ["32", "kvortex", "save", "54", "50", "0.926", "worse"],
        ["32", "kvortex", "wait_us", "90", "92", "0.978"],
    ]
    assert compare.main([str(a), str(b), "--tolerance", "0.01"]) == 0
    assert capsys.readouterr().out.count("worse") == 2
    assert compare.main([str(a), str(b), "--tolerance", "0.1"]) == 0
    assert "worse" not in capsys.readouterr().out


def test_fail_below(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.json", rows=rows(save=50.0))
    assert compare.main([str(a), str(b), "--fail-below", "0.92"]) == 0
    assert compare.main([str(a), str(b), "--fail-below", "0.93"]) == 1
    assert compare.main([str(b), str(a), "--fail-below", "0.93"]) == 0


def test_wrong_bytes_fail(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = written(tmp_path / "b.json", rows=rows(wrong_bytes=3))
    assert compare.main([str(a), str(b)]) == 0
    assert f"{b}: 3 bytes were wrong" in capsys.readouterr().out
    assert compare.main([str(a), str(b), "--fail-below", "0.1"]) == 1


def test_rows_that_only_one_has_are_named(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = written(tmp_path / "b.json", rows=rows(fragment_kib=64))
    assert compare.main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert f"only in {a}: 32 kvortex\n" in out and f"only in {b}: 64 kvortex\n" in out


@pytest.mark.parametrize(("values", "ratio"), [((0, 0), 1.0), ((0, 1), float("inf")), ((1, 0), 0.0)])
def test_zeros(values: tuple[int, int], ratio: float, tmp_path: Path) -> None:
    one, other = (written(tmp_path / f"{at}.json", rows=rows(save=value)) for at, value in enumerate(values))
    assert compare.changes(compare.read(one), compare.read(other))[2].ratio == ratio


DIFFERENT = [
    ({"name": "latency"}, "question is 'fragments' here, 'latency' there"),
    ({"environment": {"device": GPU | {"gpu": "Another"}}}, "device is 'A GPU' here, 'Another' there"),
    ({"environment": {"device": {"device": "host", "cpu": "x", "cores": 2}}}, "is 'A GPU' here, 'host, x, 2 cores' there"),
    ({"command": "python -m perf fragments --device cuda --quick"}, "--quick is False here, True there"),
    ({"keys": ["method", "fragment_kib"]}, "keys is"),
    ({"rows": []}, "have no row in common"),
    ({"better": {"bytes": "higher"}}, "have no row in common"),
]


@pytest.mark.parametrize(("changed", "message"), DIFFERENT, ids=[message for _, message in DIFFERENT])
def test_results_that_do_not_belong_together(
    changed: dict[str, Any], message: str, a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = written(tmp_path / "b.json", **changed)
    with pytest.raises(ArgumentError, match=message):
        compare.changes(compare.read(a), compare.read(b))
    assert compare.main([str(a), str(b), "--fail-below", "0"]) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.startswith(f"compare: {a} and {b} ") and captured.err.count("\n") == 1


def test_another_driver_is_no_other_device(a: Path, tmp_path: Path) -> None:
    b = written(tmp_path / "b.json", environment={"device": GPU | {"driver": "590.1"}})
    assert compare.changes(compare.read(a), compare.read(b))


NO_RESULTS = [
    ("", "is no JSON"),
    ("{", "is no JSON"),
    ("[" * 100_000, "is no JSON: nested too deeply"),
    ("9" * 5000, "is no JSON"),
    ("[]", r"is no result of python -m perf: it needs name, command, environment, rows; seen: \[\]"),
    ("null", "is no result"),
    (json.dumps(RESULT | {"rows": {}}), "is no result"),
    (json.dumps(RESULT | {"name": 1}), "is no result"),
    (json.dumps({name: RESULT[name] for name in RESULT if name != "keys"}), "an older version wrote it"),
    (json.dumps(RESULT | {"better": {}}), "an older version wrote it"),
    (json.dumps(RESULT | {"better": {"save": "more"}}), "'higher' or 'lower'; seen: .*'more'"),
    (json.dumps(RESULT | {"better": {"save": [1]}}), "'higher' or 'lower'"),
    (json.dumps(RESULT | {"keys": [1]}), "keys must name columns"),
    (json.dumps(RESULT | {"environment": {}}), "does not say on which device"),
    (json.dumps(RESULT | {"environment": {"device": "cuda"}}), "does not say on which device"),
    (json.dumps(RESULT | {"rows": [1]}), "row 0: must have fragment_kib, method; seen: 1"),
    (json.dumps(RESULT | {"rows": rows(method=None)}), "row 1: must have fragment_kib, method"),
    (json.dumps(RESULT | {"rows": rows(fragment_kib=4)}), "row 1: 4 kvortex is there twice"),
    (json.dumps(RESULT | {"rows": rows(save="fast")}), "row 1: save = 'fast': must be a number from 0 on"),
    (json.dumps(RESULT | {"rows": rows(save=-1)}), "row 1: save = -1"),
    (json.dumps(RESULT | {"rows": rows(save=10**400)}), "row 1: save = "),
    (json.dumps(RESULT | {"rows": rows(save=True)}), "row 1: save = True"),
    (json.dumps(RESULT | {"rows": rows(save=float("nan"))}), "is no JSON: NaN is no number in JSON"),
    (json.dumps(RESULT).replace("54.0", "1e999"), "row 1: save = inf"),
    (json.dumps(RESULT | {"rows": rows(wrong_bytes="no")}), "row 1: wrong_bytes = 'no'"),
]


@pytest.mark.parametrize(("text", "message"), NO_RESULTS, ids=range(len(NO_RESULTS)))
def test_what_is_no_result(text: str, message: str, a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = tmp_path / "b.json"
    b.write_text(text)
    with pytest.raises(ArgumentError, match=message):
        compare.read(b)
    for pair in ([a, b], [b, a]):
        assert compare.main(list(map(str, pair))) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"compare: {b}: ") and error.count("\n") == 1 and len(error) < 600


def test_files_that_cannot_be_read(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin").write_bytes(b'{"name": "\xe9"}')
    found = ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory"), (tmp_path / "latin", "is no JSON"))
    for path, message in found:
        assert compare.main([str(a), str(path)]) == 2
        assert f"compare: {path}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a.json"], ["a", "b", "--tolerance", "x"], ["a", "b", "--fail-below", "-1"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        compare.main(arguments)
    assert caught.value.code == 2 and "usage: python perf/compare.py" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["-m", "perf.compare"], [str(ROOT / "perf" / "compare.py")]], ids=["module", "file"])
def test_it_runs_as_a_module_and_as_a_file(how: list[str], a: Path, tmp_path: Path) -> None:
    where = ROOT if how[0] == "-m" else tmp_path
    done = subprocess.run([sys.executable, *how, str(a), str(a)], cwd=where, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr and "1.000" in done.stdout
