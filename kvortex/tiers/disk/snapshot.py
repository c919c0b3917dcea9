"""What a slab that was closed leaves beside it, so that the next opening need not look at every header.

``kvortex.snapshot`` is a header, and a row for each slot. It is believed only if it checks, and belongs to the session that the
slab says was the last and was closed: then nothing was written since. It is a hint all the same: every read checks the record.
"""

from __future__ import annotations

import contextlib
import os

import numpy as np
import numpy.typing as npt

from kvortex.tiers.disk.superblock import Superblock, digest_of
from kvortex.tiers.disk.system import System

NAME = "kvortex.snapshot"
MAGIC = int.from_bytes(b"KVXSNAP0", "little")
VERSION = 1
HEADER = np.dtype(
    [
        ("magic", "<u8"),
        ("version", "<u4"),
        ("row_bytes", "<u4"),
        ("rows", "<u8"),
        ("session", "<u8"),
        ("store", "u1", 16),
        ("rows_check", "u1", 16),
        ("check", "u1", 16),
    ]
)
ROW = np.dtype(
    [("key", "u1", 32), ("bytes", "<i8"), ("generation", "<u8"), ("mark", "<u8"), ("before", "<u8"), ("live", "<u8")]
)
Rows = npt.NDArray[np.void]


def write(folder: str, rows: Rows, of: Superblock, system: System) -> None:
    """Puts it in place as a whole; OSError where that does not go."""
    raw = np.zeros(1, HEADER)
    raw["magic"], raw["version"], raw["row_bytes"], raw["rows"] = MAGIC, VERSION, ROW.itemsize, len(rows)
    raw["session"], raw["store"] = of.session, np.frombuffer(of.store, np.uint8)
    raw["rows_check"] = np.frombuffer(digest_of(rows.tobytes()), np.uint8)
    raw["check"] = np.frombuffer(digest_of(raw.tobytes()[:-16]), np.uint8)
    whole = memoryview(raw.tobytes() + rows.tobytes())
    path = os.path.join(folder, NAME)
    fd = system.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        done = 0
        while done < len(whole):
            done += system.pwritev(fd, [whole[done : done + (1 << 30)]], done)
        system.fdatasync(fd)
    finally:
        os.close(fd)
    os.replace(path + ".new", path)
    sync_folder(folder)


def read(folder: str, of: Superblock, system: System) -> Rows | None:
    """The rows, if they are those of the slab's last session and it was closed; else None."""
    if not of.closed:
        return None
    try:
        fd = system.open(os.path.join(folder, NAME), os.O_RDONLY)
    except OSError:
        return None
    try:
        data = _read_all(fd, system)
    except OSError:
        return None
    finally:
        os.close(fd)
    if len(data) < HEADER.itemsize:
        return None
    raw = np.frombuffer(data, HEADER, 1)[0]
    body = data[HEADER.itemsize :]
    ours = (int(raw["magic"]), int(raw["version"]), int(raw["row_bytes"])) == (MAGIC, VERSION, ROW.itemsize)
    ours &= raw["check"].tobytes() == digest_of(raw.tobytes()[:-16])
    last = int(raw["session"]) == of.session and raw["store"].tobytes() == of.store
    whole = len(body) == int(raw["rows"]) * ROW.itemsize and raw["rows_check"].tobytes() == digest_of(body)
    return np.frombuffer(body, ROW) if ours and last and whole else None


def _read_all(fd: int, system: System) -> bytes:
    data = memoryview(bytearray(os.fstat(fd).st_size))
    done = 0
    while done < len(data):
        got = system.preadv(fd, [data[done : done + (1 << 30)]], done)
        if not got:
            break
        done += got
    return bytes(data[:done])


def remove(folder: str) -> None:
    """It is of no use any more."""
    for name in (NAME, NAME + ".new"):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, name))


def sync_folder(folder: str) -> None:
    """Names in a folder outlive a loss of power from now on; nothing where the file system cannot say so."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
