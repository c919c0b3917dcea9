"""The cache folder: where it is, and that a file is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvortex.kernels import cache

MAGIC = b"KVXTESTS"


def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KVORTEX_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "kvortex"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "kvortex"
    monkeypatch.setenv("KVORTEX_CACHE_DIR", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVORTEX_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.pathlib.Path, "home", nobody)
    path = cache.cache_folder() / "file"
    assert not cache.write(path, MAGIC, 1, b"body") and cache.read(path, MAGIC, 1) is None


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    assert cache.read(path, MAGIC, 1) is None and cache.write(path, MAGIC, 1, b"body")
    assert cache.read(path, MAGIC, 1) == b"body" and cache.read(path, MAGIC, 2) is None
    assert cache.read(path, b"KVXOTHER", 1) is None and cache.read(path.parent, MAGIC, 1) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_write_that_ends_early_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[BaseException]
) -> None:
    def ends(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", ends)
    if error is OSError:
        assert not cache.write(tmp_path / "file", MAGIC, 1, b"body")
    else:
        with pytest.raises(error):
            cache.write(tmp_path / "file", MAGIC, 1, b"body")
    assert not list(tmp_path.iterdir())
