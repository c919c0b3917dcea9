"""Files of the cache folder: each is whole and ours, or as good as absent.

A file: magic (8 bytes), version, length of what follows the header (little-endian), its SHA-256, and that.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import struct
import tempfile

_HEADER = struct.Struct("<8sIQ32s")
_NOWHERE = pathlib.Path(os.devnull, "kvortex")


def cache_folder() -> pathlib.Path:
    """Where files are kept: ``$KVORTEX_CACHE_DIR``, else ``$XDG_CACHE_HOME/kvortex``, else ``~/.cache/kvortex``.

    A folder that nobody can make where the user has no home, as in some containers.
    """
    named = os.environ.get("KVORTEX_CACHE_DIR")
    if named:
        return pathlib.Path(named)
    try:
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kvortex"
    except RuntimeError:
        return _NOWHERE


def read(path: pathlib.Path, magic: bytes, version: int) -> bytes | None:
    """What :func:`write` put there; None where there is no file, or another one, or a damaged one."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _HEADER.size:
        return None
    body = data[_HEADER.size :]
    whole = magic, version, len(body), hashlib.sha256(body).digest()
    return body if _HEADER.unpack_from(data) == whole else None


def write(path: pathlib.Path, magic: bytes, version: int, body: bytes) -> bool:
    """Writes a file whole or not at all; False where the folder cannot be written.

    ``magic`` is 8 bytes.
    """
    head = _HEADER.pack(magic, version, len(body), hashlib.sha256(body).digest())
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
            temporary = file.name
            file.write(head + body)
        os.replace(temporary, path)
        temporary = None
    except OSError:
        return False
    finally:  # also after an interrupt
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return True
