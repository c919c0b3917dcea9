"""One file of slots: opened by one owner, laid out at once, and read and written a record at a time.

``kvortex.slab`` is the superblock twice, a record for :meth:`kvortex.tiers.Tier.probe`, and slots of one size: a page for the
header, and the payload behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import os
import stat
import weakref
from collections.abc import Callable

from kvortex.errors import ConfigError
from kvortex.tiers.disk import superblock
from kvortex.tiers.disk.pages import PAGE, Pages, padded
from kvortex.tiers.disk.superblock import COPIES, Superblock
from kvortex.tiers.disk.system import System

NAME = "kvortex.slab"
PROBE = COPIES * PAGE  # where the record of probes lies, of one page
START = PROBE + 2 * PAGE  # where slots begin
MOST_AT_ONCE = 0x7FFF_F000  # bytes of one preadv or pwritev; Linux does no more (read(2), write(2))
# EINVAL too: where a file system has no such call, the C library writes a byte a block instead, which O_DIRECT refuses.
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class ShortTransferError(OSError):
    """Fewer bytes came or went than were asked for."""


def slot_bytes_for(most_bytes: int) -> int:
    """What one record takes."""
    return PAGE + padded(most_bytes)


class Slab:
    """A slab that this process owns.

    Parameters
    ----------
    folder
        Is made where it is missing.
    nbytes
        Of the file, at most.
    slot_bytes, namespace
        What an existing slab must have, unless it is to be emptied.
    direct, durable, reset
        Of :class:`kvortex.tiers.disk.DiskOptions`; durable is O_DSYNC.
    system

    Attributes
    ----------
    was : Superblock or None
        As it was found; None for a new, or an emptied, slab.
    now : Superblock
        As it is while this process owns it.
    slots : int
    direct : bool
    notes : list of str

    Raises
    ------
    ConfigError
        It is owned by somebody else, belongs to another namespace, is no slab, or cannot be made.
    """

    def __init__(
        self,
        folder: str,
        nbytes: int,
        slot_bytes: int,
        namespace: bytes,
        *,
        direct: bool,
        durable: bool,
        reset: bool,
        system: System,
    ) -> None:
        self.folder, self.path = folder, os.path.join(folder, NAME)
        self.slot_bytes, self.slots = slot_bytes, (nbytes - START) // slot_bytes
        self.notes: list[str] = []
        self._system, self._fd = system, -1
        self._pages = Pages()
        _OPEN.add(self)
        try:
            self._fd, self.direct = self._open(direct, durable)
            self._own(namespace, reset)
        except OSError as error:
            self.close()
            raise ConfigError(f"{self.path}: {error.strerror or error}; {_cure(error)}") from error
        except BaseException:
            self.close()
            raise

    def _open(self, direct: bool, durable: bool) -> tuple[int, bool]:
        """The descriptor, locked, and whether it keeps out of the page cache."""
        os.makedirs(self.folder, 0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | (os.O_DSYNC if durable else 0)
        while True:
            fd, went = self._open_file(flags, direct)
            try:
                lock(fd, self.path)
                if same_file(fd, self.path):  # not one that its owner removed in the meantime
                    return fd, went
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _open_file(self, flags: int, direct: bool) -> tuple[int, bool]:
        if direct:
            try:
                return self._system.open(self.path, flags | os.O_DIRECT), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._note_buffered()
        return self._system.open(self.path, flags), False

    def _note_buffered(self) -> None:
        self.notes.append(f"{self.folder}: the file system has no O_DIRECT; records go through the page cache")

    def _own(self, namespace: bytes, reset: bool) -> None:
        """Makes of the file what it is to be, and says on disk that it is open."""
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{self.path} is no regular file; move it away, or name another folder in paths")
        if stat.S_IMODE(found.st_mode) != 0o600:
            os.fchmod(self._fd, 0o600)
        self.was = self._recognised(found.st_size, namespace, reset)
        if self.was is None and found.st_size:
            self._system.ftruncate(self._fd, 0)  # else records of before would be found by the next scan
        self._resize(found.st_size)
        fresh = Superblock(self.slot_bytes, self.slots, namespace)
        old = self.was or fresh
        self.now = dataclasses.replace(old, slots=self.slots, session=old.session + 1, closed=False)
        self._write_superblock(self.now)

    def _recognised(self, size: int, namespace: bytes, reset: bool) -> Superblock | None:
        """The superblock to go on with; None for an empty file, or one to be emptied."""
        if size == 0:
            return None
        data = self._read_superblock()
        if not any(data):  # its maker did not come further
            return None
        found = superblock.read(data)
        cure = "name another folder in paths, or start empty with reset=True"
        if found is None:
            trouble = "is no slab of this version of kvortex, or is damaged"
        elif found.namespace != namespace:
            trouble = f"holds records of another model, layout, codec or rank (namespace {found.namespace.hex()[:16]}...)"
        elif found.slot_bytes != self.slot_bytes:
            trouble = f"has slots of {found.slot_bytes} bytes, not {self.slot_bytes}"
        else:
            return None if reset else found
        if reset:
            return None
        raise ConfigError(f"{self.path} {trouble}; {cure}")

    def _resize(self, before: int) -> None:
        nbytes = START + self.slots * self.slot_bytes
        if self.was is not None and before > nbytes:
            self._system.ftruncate(self._fd, nbytes)
        free = self._free_bytes()
        if free is not None and nbytes - os.fstat(self._fd).st_blocks * 512 > free:  # asked first, for trying takes it all
            raise self._no_room(nbytes, before, "the disk is too full")
        try:
            self._system.fallocate(self._fd, nbytes)
        except OSError as error:
            if error.errno in _NO_FALLOCATE:
                self._system.ftruncate(self._fd, nbytes)
                self.notes.append(f"{self.folder}: the file system reserves no space; the disk may be full later")
                return
            with contextlib.suppress(OSError):  # what was got of it is of no use
                self._system.ftruncate(self._fd, before if self.was is not None else 0)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise self._no_room(nbytes, before, str(error.strerror)) from error

    def _free_bytes(self) -> int | None:
        """None where the file system does not say."""
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize if found.f_blocks else None

    def _no_room(self, nbytes: int, before: int, why: str) -> ConfigError:
        return ConfigError(
            f"{self.path}: {nbytes} bytes cannot be had ({why}): {self._free_bytes()} are free beside the {before} that the "
            "slab has; lower capacity_bytes, or make room"
        )

    def _read_superblock(self) -> bytes:
        pages = [self._pages.header, self._pages.tail]
        try:
            got = self._system.preadv(self._fd, pages, 0)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise
            self._go_buffered()
            got = self._system.preadv(self._fd, pages, 0)
        return b"".join(map(bytes, pages))[:got]

    def _write_superblock(self, block: Superblock) -> None:
        """Twice, one after the other: a torn write leaves one of them. The first write is also what proves O_DIRECT."""
        self._pages.header[:] = block.page()
        for copy in range(COPIES):
            try:
                self._all(self._system.pwritev(self._fd, [self._pages.header], copy * PAGE), PAGE)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self._go_buffered()
                self._all(self._system.pwritev(self._fd, [self._pages.header], copy * PAGE), PAGE)
            self._system.fdatasync(self._fd)

    def _go_buffered(self) -> None:
        """O_DIRECT was taken and is not done: from now on nothing uses it on this file."""
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        self.direct = False
        self._note_buffered()

    @staticmethod
    def _all(done: int, wanted: int) -> None:
        if done != wanted:
            raise ShortTransferError(errno.EIO, f"{done} of {wanted} bytes went through")

    def offset(self, slot: int) -> int:
        """Where a slot begins."""
        return START + slot * self.slot_bytes

    def write(self, offset: int, address: int, nbytes: int, pages: Pages) -> None:
        """Header and payload in one call; OSError where not all of it was written."""
        self.wrote(self.to_write(offset, address, nbytes, pages)(), nbytes)

    def to_write(self, offset: int, address: int, nbytes: int, pages: Pages) -> Callable[[], int]:
        """The system's call for :meth:`write`, all but made: with nothing beside it to be done while the disk waits."""
        return functools.partial(self._system.pwritev, self._fd, pages.to_write(address, nbytes), offset)

    def wrote(self, done: int, nbytes: int) -> None:
        """Of what the call returned; OSError where not all of it was written."""
        self._all(done, PAGE + padded(nbytes))

    def read(self, offset: int, address: int, nbytes: int, pages: Pages) -> None:
        """Header and payload in one call; OSError where not all of it came."""
        self.came(self.to_read(offset, address, nbytes, pages)(), address, nbytes, pages)

    def to_read(self, offset: int, address: int, nbytes: int, pages: Pages) -> Callable[[], int]:
        """The system's call for :meth:`read`, as :meth:`to_write`."""
        return functools.partial(self._system.preadv, self._fd, pages.to_read(address, nbytes), offset)

    def came(self, done: int, address: int, nbytes: int, pages: Pages) -> None:
        """Of what the call returned: the payload is where it belongs then; OSError where not all of it came."""
        self._all(done, PAGE + padded(nbytes))
        pages.arrived(address, nbytes)

    def read_run(self, offset: int, buffer: memoryview) -> None:
        """Some slots, or a page, for scans; OSError where not all of it came."""
        self._all(self._system.preadv(self._fd, [buffer], offset), len(buffer))

    def erase(self, offset: int, pages: Pages) -> None:
        """Puts zeros where a header is: nobody finds that record again once :meth:`sync` has passed too."""
        pages.header[:] = bytes(PAGE)
        self._all(self._system.pwritev(self._fd, [pages.header], offset), PAGE)

    def sync(self) -> None:
        """What was written until now is on the drive."""
        self._system.fdatasync(self._fd)

    def end(self) -> None:
        """Says on disk that it was closed, after which nothing is written."""
        self.now = dataclasses.replace(self.now, closed=True)
        self._write_superblock(self.now)

    def close(self) -> None:
        """Lets go of the file. Twice does no harm."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


_OPEN: weakref.WeakSet[Slab] = weakref.WeakSet()


def _let_go() -> None:
    """A forked child would keep its parent's slabs locked for as long as it lives."""
    for slab in list(_OPEN):
        slab.close()


os.register_at_fork(after_in_child=_let_go)


def lock(fd: int, path: str) -> None:
    """Takes the slab for this descriptor; ConfigError where another has it, in whichever process."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{path} is in use by another engine; give each engine a folder of its own, or close the other one first"
        ) from None


def same_file(fd: int, path: str) -> bool:
    """Whether a descriptor is what the path still names."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _cure(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "it is a symbolic link, which is not followed; remove it, or name the folder that it points to"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "name a folder in paths that this user may write to"
    return "name another folder in paths"

