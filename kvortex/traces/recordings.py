"""The recordings of one engine: none, as a rule, which then costs a call one look into an empty dictionary."""

from __future__ import annotations

import itertools
import os
import time

from kvortex.config import ENV_PREFIX
from kvortex.errors import ArgumentError, ConfigError, TraceError, shown
from kvortex.keys import KeyArray
from kvortex.traces.recording import Recording

VARIABLE = ENV_PREFIX + "RECORD_TRACE"
_LEAST_S = 1.0  # to write what waits, at the end of an engine that has used its time up


class Recordings:
    """Recordings that are open, or were until a moment ago. Thread-safe: single operations of a dict are atomic."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._open: dict[int, Recording] = {}

    def open(self, path: str | os.PathLike[str], aloud: bool = False) -> Recording:
        """One more; see :meth:`kvortex.KVortexEngine.record`."""
        recording = Recording(path, self._block_size, aloud=aloud)
        self._open[id(recording)] = recording
        return recording

    def open_as_told(self, path: str | None) -> None:
        """As the config's ``record_trace`` says, or where that is None the environment.

        Raises
        ------
        ConfigError
            The file cannot be written, or what is there is no file.
        """
        told = os.environ.get(VARIABLE, "") if path is None else path
        if os.path.lexists(told) and not os.path.isfile(told):  # a neighbour of /dev/null is not what was meant
            raise ConfigError(f"record_trace = {shown(told)}: is there, and is no regular file; take another name")
        while told:
            free = _free_path(told)
            try:
                self.open(free, aloud=path is None)  # nobody in the program looks after that one
                return
            except ArgumentError as error:
                if not os.path.lexists(free):  # else another engine was quicker, and there is a next name
                    raise ConfigError(f"record_trace = {shown(told)}: {error}") from None

    def note(self, kind: int, keys: KeyArray) -> None:
        """A call that has begun: one that was refused is in no trace."""
        if not self._open:
            return
        for recording in list(self._open.values()):
            if recording.closed and not recording.failed:  # what failed counts what it lacks, until close() has told it
                self._open.pop(id(recording), None)
            else:
                recording.note(kind, keys)

    def close(self, deadline: float) -> list[str]:
        """Closes all, and says what went wrong."""
        notes = []
        for recording in list(self._open.values()):
            try:
                recording.close(max(_LEAST_S, deadline - time.monotonic()))
            except TraceError as error:  # the engine has ended well, whatever became of the trace
                notes.append(f"recording: {error}")
            if recording.dropped:
                why = "" if recording.failed else ", for which its writer was too slow"
                notes.append(f"recording: {recording.path} lacks {recording.dropped} calls{why}")
            self._open.pop(id(recording), None)
        return notes


def _free_path(path: str) -> str:
    """``path``, or the first of ``name-2.jsonl``, ``name-3.jsonl`` ... that is not there yet."""
    stem, ending = os.path.splitext(path)
    names = itertools.chain([path], (f"{stem}-{n}{ending}" for n in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))
