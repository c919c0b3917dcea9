"""Host memory that is fast to get: mapped, on huge pages where the kernel has them, for several threads to fault in."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import pathlib

from kvortex.errors import PinnedMemoryError
from kvortex.memory import numa

HUGE_PAGE = 2 << 20
_MADV_WIPEONFORK = 18  # of linux/mman.h, since 4.14; Python's mmap has no name for it


class Mapping:
    """Anonymous private memory, zero-filled, not resident yet (:class:`kvortex.memory.filling.Filler`), zero again in forked
    children.

    Parameters
    ----------
    nbytes
        At least 1.
    node
        NUMA node to bind to, None for the kernel's choice.

    Attributes
    ----------
    address : int
        Aligned to ``HUGE_PAGE``.
    nbytes : int
    notes : list of str
        What was wished for and could not be had (huge pages, the NUMA node).
    """

    def __init__(self, nbytes: int, node: int | None = None) -> None:
        available = _available_bytes()
        if available is not None and nbytes > available:
            raise PinnedMemoryError(
                f"{nbytes} bytes of host memory were asked for and {available} are available; lower cpu_pool_size_bytes"
            )
        self.nbytes = nbytes
        self.notes: list[str] = []
        try:
            # Address space for one huge page more, so that the start can be aligned; it is never touched.
            self._map = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise PinnedMemoryError(f"cannot map {nbytes} bytes of host memory ({error}); lower cpu_pool_size_bytes") from None
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = base + -base % HUGE_PAGE
        self._ask_for_huge_pages(self.address - base)
        # A child would otherwise share these pages copy-on-write, and the parent's next write would move them away from
        # where the GPU has them. The child gets zeros in their place and not a hole (MADV_DONTFORK): it would put
        # memory of its own there, and lose that when it drops the engine that it inherited.
        self._advise(_MADV_WIPEONFORK, "MADV_WIPEONFORK")
        if node is not None and (reason := numa.bind(self.address, nbytes, node)):
            self.notes.append(reason)

    def _ask_for_huge_pages(self, skip: int) -> None:
        """Asks for those that lie inside as a whole: the first touch of one takes all of it, also what is beyond the end.

        What is behind them must refuse them, since a kernel that is set to "always" gives them unasked. The slack in
        front is never touched, and so needs no advice.
        """
        whole = self.nbytes // HUGE_PAGE * HUGE_PAGE
        if whole:
            self._advise(getattr(mmap, "MADV_HUGEPAGE", None), "huge pages", skip, whole)
        with contextlib.suppress(OSError, AttributeError):  # a kernel or platform without huge pages gives none anyway
            self._map.madvise(mmap.MADV_NOHUGEPAGE, skip + whole)

    def _advise(self, advice: int | None, what: str, start: int = 0, nbytes: int | None = None) -> None:
        if advice is None:
            self.notes.append(f"no {what} on this platform")
            return
        try:
            self._map.madvise(advice, start, len(self._map) - start if nbytes is None else nbytes)
        except OSError as error:
            self.notes.append(f"no {what}: {error.strerror}")

    def close(self) -> None:
        """Unmaps, or leaves that to the last view of the memory. A second call does nothing."""
        with contextlib.suppress(BufferError):
            self._map.close()


def _available_bytes() -> int | None:
    """Memory that can be had without swapping; asking the kernel beats being killed by it."""
    return min((n for n in (_of_machine(), _of_container()) if n is not None), default=None)


def _of_machine() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, LookupError, ValueError):
        return None


def _of_container(folder: pathlib.Path = pathlib.Path("/sys/fs/cgroup")) -> int | None:
    """Under the limit of this control group (version 2), counting clean file pages as free; None without a limit."""
    try:
        limit, used = int((folder / "memory.max").read_text()), int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    except (OSError, LookupError, ValueError):  # "max" is no number: no limit
        return None
