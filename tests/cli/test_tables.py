"""``kvortex calibrate --tables``: a sample in, a file out that an engine takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvortex.cli import main
from kvortex.codecs import RecordShape, Tables, calibrate
from kvortex.codecs.samples import records_of
from tests.codecs.sample import records_of as naive_records
from tests.engine.coded import D, H, L, caches, kv

SHAPE = RecordShape(L, H, D)
TOKENS = 7 * 16 + 5


def sample_of(seed: int) -> np.ndarray[Any, Any]:
    """(layers, 2, tokens, heads, head_dim) bf16 patterns."""
    pages = kv(np.random.default_rng(seed), SHAPE, 8).view(np.uint16).reshape(8, L, 2, 16, H, D)
    return np.ascontiguousarray(pages.transpose(1, 2, 0, 3, 4, 5).reshape(L, 2, 128, H, D)[:, :, :TOKENS])


def saved(folder: Path, name: str, array: Any) -> str:
    np.save(folder / f"{name}.npy", array)
    return str(folder / f"{name}.npy")


@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_a_file_for_engines(order: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = sample_of(1), sample_of(2), str(tmp_path / "deep" / "t")
    bf16 = np.ascontiguousarray(b).view("V2")  # as NumPy has it from a library with that dtype
    files = saved(tmp_path, "a", a), saved(tmp_path, "b", bf16)
    assert main(["calibrate", "--tables", out, "--sample", *files, "--order", order, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    wanted = np.concatenate([naive_records(each[:, :, 16:112], order) for each in (a, b)])  # whole blocks behind the first
    shape = RecordShape(L, H, D, order=order)
    tables, seen = Tables.load(out)
    assert seen == shape and tables.digest == calibrate(wanted, shape).digest
    assert said["digest"] == tables.digest.hex() and said["tokens"] == 2 * 6 * 16
    assert said["codecs"]["plane"]["ratio"] > 1.3 and said["codecs"]["k4v4"]["ratio"] > 3.4
    cache, _ = caches()["HND" if order == "HND" else "K and V in a tensor"]
    with cache.engine(codec="k4v4", codec_tables=out) as engine:
        assert engine.codec is not None and engine.codec.shape == shape


def test_float32_of_bf16_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = sample_of(1)
    wide = (a.astype(np.uint32) << 16).view(np.float32)
    for name, array in (("a", a), ("wide", wide)):
        assert main(["calibrate", "--tables", str(tmp_path / name), "--sample", saved(tmp_path, name, array)]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "wide").read_bytes()
    screen = capsys.readouterr()
    assert "plane" in screen.out and "a slot of" in screen.out and "1500 or more" in screen.err


def test_a_latent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latent = np.ascontiguousarray(sample_of(3)[:, 0].reshape(L, TOKENS, H * D))
    out = str(tmp_path / "t")
    assert main(["calibrate", "--tables", out, "--sample", saved(tmp_path, "a", latent), "--json", "--skip", "0"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Tables.load(out)[1] == RecordShape(L, 1, H * D, parts="L") and said["tokens"] == 7 * 16
    assert "never measured" in said["codecs"]["k4v4"]["refused"] and said["codecs"]["plane"]["tried"] == 7


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("halves", np.zeros((2, 2, 64, 2, 64), np.float16), "seen: 'float16'"),
        ("no bf16", np.full((2, 2, 64, 2, 64), 1 / 3, np.float32), "not bf16"),
        ("K alone", np.zeros((2, 1, 64, 2, 64), np.uint16), "seen: shape (2, 1, 64, 2, 64)"),
        ("flat", np.zeros(64, np.uint16), "must be (layers, 2, tokens, heads, head_dim)"),
        ("short", np.zeros((2, 2, 31, 2, 64), np.uint16), "no block of 16 tokens behind the first 16"),
        ("objects", np.array([{}], object), "cannot be read"),
        ("empty", np.zeros((0, 2, 64, 2, 64), np.uint16), "layers = 0"),
    ],
)
def test_what_is_no_sample(name: str, array: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if array.dtype == object:
        np.save(tmp_path / "x.npy", array, allow_pickle=True)
        path = str(tmp_path / "x.npy")
    else:
        path = saved(tmp_path, "x", array)
    assert main(["calibrate", "--tables", str(tmp_path / "t"), "--sample", path]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_other_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, out = saved(tmp_path, "a", sample_of(1)), str(tmp_path / "t")
    b = saved(tmp_path, "b", sample_of(1)[1:])
    for arguments, message in [
        (["--tables", out], "needs --sample"),
        (["--sample", a], "--tables names a file"),
        (["--tables", out, "--sample", a, b], "is of other records than"),
        (["--tables", out, "--sample", str(tmp_path / "none.npy")], "cannot be read"),
        (["--tables", str(tmp_path / "a.npy" / "t"), "--sample", a], "cannot be written"),
    ]:
        assert main(["calibrate", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_sample_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = saved(tmp_path, "a", sample_of(1)), saved(tmp_path, "b", sample_of(2))
    before = Path(b).read_bytes()
    (tmp_path / "link").symlink_to(b)
    for out in (b, str(tmp_path / "link")):
        assert main(["calibrate", "--tables", out, "--sample", a, b]) == 2
        assert "is a file of --sample: name another" in capsys.readouterr().err
        assert Path(b).read_bytes() == before


def test_records_of_long_blocks() -> None:
    a = sample_of(5)
    records, shape = records_of(a, "HND", tokens=32, skip=3)
    assert shape == RecordShape(L, H, D, 32, "HND") and len(records) == 3
    planes = records.view(np.uint16).reshape(3, L, 2, H, 32, D)
    assert (planes[2, 1, 0, 1, 7] == a[1, 0, 3 + 64 + 7, 1]).all()
