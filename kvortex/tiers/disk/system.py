"""All that a disk tier asks of the operating system while it works: one seam, so that tests can have any of it fail."""

from __future__ import annotations

import os
from collections.abc import Sequence

Buffers = Sequence[memoryview]


class System:
    """The real one. Each method raises OSError as the call of its name does, and may do less than it was asked for."""

    def open(self, path: str, flags: int) -> int:
        """A descriptor that no child inherits by exec, of a file that only its owner may read."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def preadv(self, fd: int, buffers: Buffers, offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Buffers, offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fallocate(self, fd: int, nbytes: int) -> None:
        os.posix_fallocate(fd, 0, nbytes)

    def ftruncate(self, fd: int, nbytes: int) -> None:
        os.ftruncate(fd, nbytes)
