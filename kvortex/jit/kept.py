"""Files of a function's machine code. They are Numba's but for what entries go by, and for the order of writing.

Names of ``numba.core.caching`` are no part of Numba's manual; tests/test_jit.py uses all that stands here.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from typing import Any

from numba.core.caching import IndexDataCacheFile

from kvortex.jit.stamp import layouts, reached, stamp

_FORM = "kvortex 2"  # in the place of a stamp that is the same for all entries of a file
_MOST = 4  # entries for the same types and CPU: of functions of one factory, which share a file, or of what a function was


class Kept(IndexDataCacheFile):  # type: ignore[misc]
    """An entry goes by the types of arguments with their named tuples' fields, the CPU, and the stamp of all that the function
    is made of. Where that cannot be told nothing is kept, and nothing found."""

    def __init__(self, made: Any) -> None:
        super().__init__(made._cache.cache_path, made._cache._impl.filename_base, _FORM)
        self._made, self._base = made, made._cache._impl.filename_base
        self.stamp: str | None = None  # when machine code was asked for first: of that time is all that calls go to

    def _entry(self, key: Any) -> Any:
        """What an entry goes by; None where that cannot be told."""
        # Of Numba's key the third part is left out: digests of bytecode, which a stamp has, and of variables of functions
        # around, which for compiled ones differ in every process.
        kinds, cpu, _ = key
        try:
            return kinds, cpu, layouts(getattr(kinds, "args", kinds)), stamp(self._made)
        except Exception:  # whatever looking at foreign objects raises
            return None

    def load(self, key: Any) -> Any:
        """What was kept, or None."""
        entry = self._entry(key)
        if entry is None:
            return None
        self.stamp = self.stamp or entry[-1]
        try:
            return self._load_data(self._load_index()[entry])
        except Exception:  # there is none, or somebody has just removed it, or names that it has are gone
            return None

    def save(self, key: Any, data: Any) -> None:
        """Under a name of its own, and before the index tells of it: who reads meanwhile finds the old code, or none.

        Nothing is kept where what it is made of has changed since this process asked for it first, or for what it calls.
        """
        entry = self._entry(key)
        if entry is None or not all(map(_is_of_now, reached(self._made))):
            return
        name = f"{self._base}.{uuid.uuid4().hex[:16]}.nbc"
        self._save_data(name, data)
        entries = self._load_index()
        same = [other for other in entries if other[:2] == entry[:2] and other != entry]
        old = [entry] if entry in entries else []
        old += same[: max(0, len(same) + 1 - _MOST)]
        self._save_index({other: file for other, file in entries.items() if other not in old} | {entry: name})
        for other in old:
            with contextlib.suppress(OSError):
                os.unlink(self._data_path(entries[other]))

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except Exception:  # of classes that are gone, or cut short
            return {}


def _is_of_now(function: Any) -> bool:
    files = getattr(getattr(function, "_cache", None), "_cache_file", None)
    return not isinstance(files, Kept) or files.stamp in (None, stamp(function))
