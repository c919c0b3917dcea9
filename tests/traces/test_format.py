"""Reading traces: full blocks only, and errors that name line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvortex.cli import main
from kvortex.errors import ArgumentError
from kvortex.traces.format import Trace, read_trace

GOOD = {"timestamp": 3, "input_length": 1025, "output_length": 7, "hash_ids": [4, 5, 9]}


def line(**changes: Any) -> str:
    return json.dumps({name: value for name, value in {**GOOD, **changes}.items() if value != "gone"})


def test_full_blocks_only(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lengths = [(1025, [4, 5, 9]), (1024, [4, 5]), (1023, [4, 5]), (511, [4]), (0, []), (1025, [4, 5])]
    path.write_text("\n\n".join(line(input_length=length, hash_ids=ids, more="?") for length, ids in lengths) + "\n")
    trace = read_trace(path)
    assert trace.requests() == [[4, 5], [4, 5], [4], [], [], [4, 5]] and trace.starts.tolist() == [0, 2, 4, 5, 5, 5, 7]
    assert (len(trace), trace.distinct, trace.longest, trace.block_tokens, trace.dropped) == (6, 2, 2, 512, 0)
    assert [trace.within(blocks) for blocks in (1, 2, 9)] == [4, 7, 7]
    assert read_trace(path, limit=2).requests() == [[4, 5], [4, 5]]


def test_blocks_of_another_size_and_calls_that_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [line(block_size=16, input_length=48), line(block_size=16, input_length=47, dropped=3), line(block_size=16)]
    path.write_text("\n".join(lines[:2]))
    trace = read_trace(path)
    assert trace.requests() == [[4, 5, 9], [4, 5]] and trace.block_tokens == 16 and trace.dropped == 3
    path.write_text("\n".join([lines[0], line()]))
    with pytest.raises(ArgumentError, match="line 2: blocks of 512 tokens, and of 16 before it; play them apart"):
        read_trace(path)
    path.write_text(lines[2])
    with pytest.raises(ArgumentError, match="hash_ids has 3 ids, and input_length = 1025 needs 65, one for each 16 tokens"):
        read_trace(path)


BAD = [
    ("{", "no JSON: "),
    ("\xff", "no JSON: "),
    ("[1]", "must be a JSON object with hash_ids and so on; seen: list"),
    *((line(**{name: "gone"}), f"{name} is missing") for name in GOOD),
    (line(timestamp="0"), 'timestamp must be a number of at least 0; seen: "0"'),
    (line(timestamp=float("nan")), "timestamp must be a number of at least 0; seen: NaN"),
    (line(timestamp=-1), "timestamp must be a number of at least 0; seen: -1"),
    (line(input_length=1025.0), "input_length must be an integer of at least 0; seen: 1025.0"),
    (line(input_length=True), "input_length must be an integer of at least 0; seen: true"),
    (line(input_length=-5), "input_length must be an integer of at least 0; seen: -5"),
    (line(output_length=None), "output_length must be an integer of at least 0; seen: null"),
    (line(hash_ids="4"), 'hash_ids must be a list of integers; seen: "4"'),
    (line(hash_ids=[4, 5.0, 9]), "hash_ids[1] must be an integer from 0 to 18446744073709551615; seen: 5.0"),
    (line(hash_ids=[4, -5, 9]), "hash_ids[1] must be an integer from 0 to 18446744073709551615; seen: -5"),
    (line(hash_ids=[4, 5, 2**64]), "hash_ids[2] must be an integer from 0 to 18446744073709551615; seen: 18446744073709551616"),
    (line(hash_ids=[4, 5, "x" * 99]), 'seen: "' + "x" * 36 + "..."),
    (line(input_length=10**4000), "input_length = 1" + "0" * 36 + "... needs "),
    (line(hash_ids=[4]), "hash_ids has 1 ids, and input_length = 1025 needs 3, one for each 512 tokens"),
    (line(hash_ids=[4, 9, 4]), "hash_ids[0] and hash_ids[2] are both 4; an id names a block and all that is before it"),
    (line(block_size=0), "block_size must be at least 1; seen: 0"),
    (line(block_size="16"), 'block_size must be an integer of at least 0; seen: "16"'),
    (line(stored=1), "stored must be true or false; seen: 1"),
    (line(dropped=-1), "dropped must be an integer of at least 0; seen: -1"),
    (line(hash_ids=[4, 5, 6, 7]), "hash_ids has 4 ids, and input_length = 1025 needs 3, one for each 512 tokens"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[str(at) for at in range(len(BAD))])
def test_bad_lines(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(f"{line()}\n\n{text}\n{line()}\n".encode("latin-1"))
    with pytest.raises(ArgumentError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}: line 3: ") and message in str(caught.value)
    assert main(["replay", str(path), "--device", "host"]) == 2
    assert capsys.readouterr().err == f"kvortex: {caught.value}\n"


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n \n")
    for name, message in (("empty", "no requests"), ("absent", "No such file"), (".", "Is a directory"), ("\0", "null byte")):
        with pytest.raises(ArgumentError, match=message):
            read_trace(tmp_path / name)


def test_keys_tell_ids_apart() -> None:
    requests = [[0, 1, 2**32], [2**32 + 1, 2**64 - 1, 1], []]
    trace = Trace.of(requests)
    assert trace.keys.shape == (6, 32) and trace.requests() == requests and trace.distinct == 5
    assert len({key.tobytes() for key in trace.keys}) == 5 and trace.keys[1].tobytes() == trace.keys[5].tobytes()
    assert trace.numbers.tolist() == [0, 1, 2, 3, 4, 1]
    empty = Trace.of([[], []])
    assert empty.keys.shape == (0, 32) and empty.distinct == 0 and empty.requests() == [[], []] and empty.longest == 0
