"""Recording: which blocks a live engine was asked for, written as a trace that ``kvortex replay`` takes back.

A call copies its keys into a ring, and that is all it does. A thread of the recording's own makes small integers of
them, and lines of those, ten times a second, in compiled code without the GIL. Keys are never written, only the numbers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
import weakref
from types import TracebackType

import numpy as np

from kvortex.errors import ArgumentError, TraceError, cut
from kvortex.keys import KeyArray
from kvortex.traces import _lines, _naming, _ring
from kvortex.traces._ring import CHECK, LOAD, SAVE

__all__ = ["CHECK", "LOAD", "SAVE", "Recording"]

_RING_ROWS = 1 << 18  # 8 MiB: what calls may name between two looks of the writer, a tenth of a second apart
_NAMES = 1 << 20  # keys that are told apart, 66 MiB with their hash table
_MOST_TOKENS = 1 << 40  # lengths of prompts stay far below 63 bits
_EVERY_S = 0.1
_LAST_S = 5.0  # a recording that is dropped has so long to write what it holds


class Recording:
    """A trace that is being written. Made by :meth:`kvortex.KVortexEngine.record`; a context that closes it.

    Attributes
    ----------
    path
        The file, in the Mooncake format with ``block_size`` in each line: a line for each ``check_blocks``, and one for the
        keys of a load that nobody had checked. So have the keys of a save that were neither checked nor loaded, as the blocks
        that a model generates, but with ``"stored": true``: a replay stores them, and they are no request. A
        check accounts for one later load or save of a key; one that nothing followed hides the next that nobody checked.
        Numbers count up from 0 in the order in which keys appear. ``output_length`` is 0: an engine is not told.

    Threads: calls may come from any thread; their order in the file is that in which their keys were copied. Memory: 10 MiB
    for calls that wait, 6 MiB for lines, and 66 MiB to tell 2**20 keys apart, touched as far as they are used. What cannot
    wait is left out and counted, and the next line says how many calls were (``dropped``), or a last line that has no ids; a
    key that was forgotten comes back as a new one. A forked child records nothing. A file that cannot be written ends the
    recording, which ``close`` tells, and with ``aloud`` a line on stderr at once: where the program does not know of it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        block_size: int,
        *,
        ring_rows: int = _RING_ROWS,
        names: int = _NAMES,
        aloud: bool = False,
    ) -> None:
        self.path = _name_of(path)
        if block_size > _MOST_TOKENS:
            raise ArgumentError(f"block_size = {block_size}: a trace has blocks of {_MOST_TOKENS} tokens at most")
        _load_compiled()
        self._writer = _Writer(self.path, block_size, ring_rows, max(names, ring_rows), aloud)
        self._end = weakref.finalize(self, self._writer.end, _LAST_S)
        self._writer.start(weakref.ref(self))

    def note(self, kind: int, keys: KeyArray) -> None:
        """A call: ``CHECK``, ``LOAD`` or ``SAVE`` of ``keys``, (n, 32) uint8. Copies them and returns; never raises.

        Where the file has failed, the call is counted as dropped.
        """
        self._writer.push(kind, keys)

    @property
    def closed(self) -> bool:
        """Whether nothing is recorded any more: closed, or failed."""
        return self._writer.stopped

    @property
    def failed(self) -> bool:
        """Whether the file could not be written, which :meth:`close` tells."""
        return self._writer.error is not None

    @property
    def lines(self) -> int:
        """Lines written so far."""
        return self._writer.lines

    @property
    def dropped(self) -> int:
        """Calls that are not in the trace, because the writer was too far behind or had failed."""
        return int(self._writer.ring.marks[_ring.DROPPED]) + self._writer.lost

    @property
    def forgotten(self) -> int:
        """Keys that had to be forgotten; should one come back, it is written as a new block."""
        return int(self._writer.names.counters[_naming.FORGOTTEN])

    def close(self, timeout: float = 60.0) -> None:
        """Writes what waits, and closes the file. Once is enough; a second time only tells the same error again.

        Raises
        ------
        TraceError
            The file could not be written, or not within ``timeout`` seconds. It ends with a whole line.
        """
        if not self._writer.end(timeout):
            raise TraceError(f"{self.path}: still being written after {timeout} seconds; close it again")
        self._end.detach()
        if self._writer.error is not None:
            raise TraceError(self._writer.told())

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except TraceError:
            if error is None:  # what the body raised comes first; ``failed`` and ``close`` tell of the trace still
                raise


class _Writer:
    """What a recording owns, apart from itself, so that its thread does not keep it alive."""

    def __init__(self, path: str, block_size: int, ring_rows: int, names: int, aloud: bool) -> None:
        self.stopped, self._path, self._aloud = False, path, aloud
        self.whole = self.lines = self.lost = self._made = 0  # bytes and lines in the file; those that failed; lines made
        self.error: BaseException | None = None
        self.names = _naming.new_names(names)
        self.ring = _ring.new_ring(ring_rows)
        self._out = np.empty(_lines.room(ring_rows), np.uint8)
        self._opening, self._block_size = _lines.opening(block_size), block_size
        # A forked child has the ring, and no thread that would empty it: what is recorded there goes nowhere.
        self._pid, self._began = os.getpid(), time.monotonic()
        self._stop = threading.Lock()
        self._stop.acquire()
        self._thread = threading.Thread(target=self._run, name="kvortex-recording", daemon=True)
        self._owner: weakref.ref[Recording] | None = None
        self._file = _create(path)  # last: whatever fails before it leaves no file

    def start(self, owner: weakref.ref[Recording]) -> None:
        """Writes from now on, until told to end, or the owner is gone."""
        self._owner = owner
        self._thread.start()

    def push(self, kind: int, keys: KeyArray) -> None:
        if self.stopped and self.error is None:
            return
        words = keys.view(np.int64)
        if not (words.flags.writeable and words.flags.aligned):  # another array type would be compiled again
            words = words.copy()
        _ring.push(self.ring, words, kind, int((time.monotonic() - self._began) * 1e3))

    def end(self, timeout: float) -> bool:
        """Has all written and the file closed; whether that is done. A child of a fork leaves it to its parent."""
        self.stopped = True
        if self._pid != os.getpid():
            return True
        with contextlib.suppress(RuntimeError):  # it was told already
            self._stop.release()
        if self._thread.ident is None:  # an interrupt came before its start
            self._close()
        elif self._thread is not threading.current_thread():  # where the collector may have brought us
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stop.acquire(timeout=_EVERY_S) and self._owner is not None and self._owner() is not None:
                self._flush()
            self.stopped = True
            self._flush()
            self._write_lost()
        except BaseException as error:  # of memory, too: whatever it is, there is nobody else to tell
            self._fail(error)
            with contextlib.suppress(OSError):  # a file that cannot be cut, or a full disk
                os.ftruncate(self._file, self.whole)
        finally:
            self._close()

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error  # before the next line: what is closed without an error is forgotten
            self.stopped = True
            self.lost = self._made - self.lines
            _ring.shut(self.ring)

    def told(self) -> str:
        """The error, and how much of the trace there is."""
        error = self.error
        reason = (error.strerror or error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}".rstrip(": ")
        return f"{self._path}: {reason}; the trace ends after {self.whole} bytes"

    def _close(self) -> None:
        file, self._file = self._file, -1
        try:
            if file >= 0:
                os.close(file)
        except OSError as error:  # of what the system had taken and could not write
            self._fail(error)
        if self._aloud and self.error is not None and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # it may be full, or closed
                print(f"kvortex: recording: {self.told()}", file=sys.stderr, flush=True)

    def _flush(self) -> None:
        calls = 1
        while calls:  # what the ring gave back is free before the file has taken the lines, which may take its time
            nbytes, calls = _lines.write_lines(self.ring, self.names, self._opening, self._block_size, self._out)
            self._made = int(self.names.counters[_naming.LINES])
            self._write(nbytes)

    def _write_lost(self) -> None:
        """Calls that were lost since the last line have no next one to tell them: a line that is no request."""
        lost = int(self.names.counters[_naming.LOST_CALLS] + self.ring.marks[_ring.DROPPED_BEFORE])
        if lost:
            line = _lines.lost(int(self.names.counters[_naming.LAST_TIME]), self._block_size, lost)
            self._out[: line.size] = line
            self._write(line.size)

    def _write(self, nbytes: int) -> None:
        """Whole lines. ``whole`` counts the bytes of those that are in the file, also where the next do not fit."""
        done = 0
        try:
            while done < nbytes:
                done += os.write(self._file, self._out[done:nbytes].data)
        finally:
            ends = np.flatnonzero(self._out[:done] == ord("\n"))
            self.whole += int(ends[-1]) + 1 if len(ends) else 0
            self.lines += len(ends)


def _name_of(path: object) -> str:
    try:
        return os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
    except TypeError:
        raise ArgumentError(f"the path of a trace must be a string or a Path; seen: {type(path).__name__}") from None


def _short(path: str) -> str:
    return cut(path.replace("\0", "\\0"), 200)


def _create(path: str) -> int:
    """A new file; a trace that took an hour to record is not overwritten."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise ArgumentError(f"{_short(path)}: is there already, and no trace is written over it; take another name") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError(f"{_short(path)}: no trace can be written there: {reason}") from None


@functools.cache
def _load_compiled() -> None:
    """Loads all that is compiled, or compiles it: not in the first call that is recorded."""
    ring, names, out = _ring.new_ring(8), _naming.new_names(8), np.empty(_lines.room(8), np.uint8)
    _ring.push(ring, np.zeros((2, 4), np.int64), CHECK, 0)
    _lines.write_lines(ring, names, _lines.opening(16), 16, out)
    _ring.shut(ring)
