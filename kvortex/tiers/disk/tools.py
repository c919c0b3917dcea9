"""What can be asked of folders without an engine: what is in them, whether it is whole, and that it goes away."""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kvortex.errors import ConfigError
from kvortex.tiers.base import Outcome
from kvortex.tiers.disk import snapshot, superblock
from kvortex.tiers.disk.pages import PAGE, padded
from kvortex.tiers.disk.recovery import in_threads, scan
from kvortex.tiers.disk.slab import NAME, START, Slab, lock
from kvortex.tiers.disk.superblock import COPIES, Superblock
from kvortex.tiers.disk.system import System
from kvortex.tiers.inventory import by_codec
from kvortex.tiers.record import RecordFormat, check_payloads


@dataclass(frozen=True)
class Listing:
    """What one folder holds.

    Parameters
    ----------
    path
        Of the slab.
    namespace, store
        Hexadecimal.
    in_use
        Whether an engine has it open; the numbers are then of one moment or another.
    closed
        Whether its last engine closed it; else the next one looks at every header.
    slots, slot_bytes
    records
        Headers that check, each key once: also of what was evicted and not overwritten.
    payload_bytes
        Of these records.
    unreadable
        Slots whose headers the disk did not give.
    codecs
        Names, each with the number of its records. Of a block that was divided, each part is one.
    """

    path: str
    namespace: str
    store: str
    in_use: bool
    closed: bool
    slots: int
    slot_bytes: int
    records: int
    payload_bytes: int
    unreadable: int
    codecs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verified:
    """What reading every record of a folder found: how many have payloads that are what was stored, how many do not, how many
    could not be read, and the keys of those that are not right (hexadecimal)."""

    path: str
    right: int
    corrupt: int
    unreadable: int
    keys: tuple[str, ...]


class _Seen(Slab):
    """A slab that is only looked at."""

    def __init__(self, folder: str, fd: int, block: Superblock) -> None:
        self.folder, self.path = folder, os.path.join(folder, NAME)
        self.was, self.now, self.slots, self.slot_bytes = block, block, block.slots, block.slot_bytes
        self._fd, self._system, self.direct, self.notes = fd, System(), False, []


@contextlib.contextmanager
def _looked_at(folder: str, flags: int = os.O_RDONLY) -> Iterator[_Seen]:
    path = os.path.join(folder, NAME)
    try:
        fd = System().open(path, flags)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a folder that a disk tier has used") from error
    try:
        block = superblock.read(os.pread(fd, COPIES * PAGE, 0))
        if block is None:
            raise ConfigError(f"{path}: is no slab of this version of kvortex, or is damaged")
        yield _Seen(folder, fd, block)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    finally:
        os.close(fd)


def listing(folder: str) -> Listing:
    """What a folder holds; changes nothing, and an engine may have it open.

    Raises
    ------
    ConfigError
        There is no slab, or it is not to be read.
    """
    with _looked_at(folder) as slab:
        headers, unread = scan(slab)
        form = RecordFormat(slab.now.namespace, slab.slot_bytes - PAGE, None)
        found = headers[form.check_headers(headers, headers["key"]) == Outcome.OK]
        _, first = np.unique(np.ascontiguousarray(found["key"]).view(np.uint64).reshape(-1, 4), axis=0, return_index=True)
        return Listing(
            slab.path,
            slab.now.namespace.hex(),
            slab.now.store.hex(),
            _in_use(folder),
            slab.now.closed,
            slab.slots,
            slab.slot_bytes,
            len(first),
            int(found["payload_bytes"][first].sum()),
            int(unread.sum()),
            by_codec(collections.Counter(found["codec"][first].tolist())),
        )


def _in_use(folder: str) -> bool:
    fd = System().open(os.path.join(folder, NAME), os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(fd)
    return False


def verify(folder: str, progress: Callable[[int, int], None] | None = None) -> Verified:
    """Reads every record of a folder and checks its payload. Changes nothing; no engine may have it open.

    Parameters
    ----------
    folder
    progress
        Told how many of how many records were read.

    Raises
    ------
    ConfigError
        There is no slab, it is not to be read, or it is in use.
    """
    with _looked_at(folder) as slab:
        lock(slab._fd, slab.path)
        headers, unread = scan(slab)
        form = RecordFormat(slab.now.namespace, slab.slot_bytes - PAGE, None)
        slots = np.flatnonzero(form.check_headers(headers, headers["key"]) == Outcome.OK)
        found = np.zeros(len(slots), np.uint8)
        mine = threading.local()

        def read(at: int) -> None:
            if not hasattr(mine, "buffer"):
                mine.buffer = memoryview(mmap.mmap(-1, slab.slot_bytes))
            header = headers[slots[at] : slots[at] + 1]
            nbytes = int(header["payload_bytes"][0])
            try:
                slab.read_run(slab.offset(int(slots[at])) + PAGE, mine.buffer[: padded(nbytes)])
            except OSError:
                found[at] = Outcome.FAILED
                return
            address = np.frombuffer(mine.buffer, np.uint8).ctypes.data
            right = check_payloads(np.array([address]), np.array([nbytes]), header["digest"])[0]
            found[at] = Outcome.OK if right else Outcome.CORRUPT

        for done, _ in enumerate(in_threads(read, range(len(slots)), "kvortex-disk-verify"), 1):
            if progress is not None:
                progress(done, len(slots))
        wrong = tuple(key.tobytes().hex() for key in headers["key"][slots[found != Outcome.OK]])
        counts = [int((found == outcome).sum()) for outcome in (Outcome.OK, Outcome.CORRUPT, Outcome.FAILED)]
        return Verified(slab.path, counts[0], counts[1], counts[2] + int(unread.sum()), wrong)


def purge(folder: str) -> int:
    """Removes what a disk tier has put into a folder, and gives back its bytes; no engine may have it open.

    The space is free again. What drives do with it is their business: it hides records, it does not erase them.

    Returns
    -------
    int
        Bytes of the slab.

    Raises
    ------
    ConfigError
        There is no slab, it is in use, or it is not to be removed.
    """
    with _looked_at(folder, os.O_RDWR) as slab:
        lock(slab._fd, slab.path)
        nbytes = START + slab.slots * slab.slot_bytes
        os.unlink(slab.path)
        snapshot.remove(folder)
        snapshot.sync_folder(folder)
        return nbytes
