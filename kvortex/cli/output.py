"""Files that commands write: whole or not at all, and refused before the work rather than after it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from typing import Any

from kvortex.errors import ArgumentError


def check_writable(option: str, path: str | None, others: dict[str, str | None]) -> None:
    """Refuses a file that cannot be written, or is one of ``others``, by what they are."""
    if path in (None, "-"):
        return
    if not path:
        raise ArgumentError(f"{option} '': names no file" + ("; - is stdout" if option == "--json" else ""))
    for what, other in others.items():
        if other and _same(path, other):
            raise ArgumentError(f"{option} {path}: is {what}, which would be lost")
    folder = os.path.dirname(os.path.realpath(path))
    place = path if _is_special(path) else folder
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(place, os.W_OK):
        raise ArgumentError(f"{option} {path}: no file can be written there")


def _same(path: str, other: str) -> bool:
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return os.path.realpath(path) == os.path.realpath(other)


def _is_special(path: str) -> bool:
    """A pipe or a device, which is written into; a file is replaced."""
    return os.path.exists(path) and not os.path.isfile(path)


def write_json(report: dict[str, Any], path: str) -> None:
    """``--json``: one line; ``-`` is stdout."""
    text = json.dumps(report) + "\n"
    if path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    write("--json", path, text.encode())


def write(option: str, path: str, data: bytes) -> None:
    """The whole content of a file."""
    try:
        if _is_special(path):
            with open(path, "wb") as file:
                file.write(data)
        else:
            _replace(os.path.realpath(path), data)
    except OSError as error:
        raise ArgumentError(f"{option} {path}: {error.strerror or error}") from None


def _replace(path: str, data: bytes) -> None:
    """All or nothing: what was there stays until all of it is written."""
    # Short, whatever the name: that may be as long as a name can be.
    part = os.path.join(os.path.dirname(path), f".kvortex.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
