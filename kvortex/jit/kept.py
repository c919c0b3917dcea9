"""Files of a function's machine code. They are Numba's but for the names that entries go by, and for the order of writing.

Names of ``numba.core.caching`` are no part of Numba's manual; tests/test_jit.py uses all that stands here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import Any

from numba.core.caching import IndexDataCacheFile

from kvortex.jit.stamp import layouts, stamp

_FORM = "kvortex 1"  # in the place of a stamp that is the same for all entries of a file


class Kept(IndexDataCacheFile):  # type: ignore[misc]
    """An entry goes by Numba's key (types of arguments, CPU, bytecode, variables of functions around), the stamp of all that
    the function is made of, and the layouts of its arguments' named tuples. So functions of one factory, which share a file,
    have an entry each; of one and the same only what was made last is kept."""

    def __init__(self, made: Any) -> None:
        super().__init__(made._cache.cache_path, made._cache._impl.filename_base, _FORM)
        self._made, self._base = made, made._cache._impl.filename_base

    def _whole(self, key: Any) -> Any:
        return key, stamp(self._made), layouts(getattr(key[0], "args", key[0]))

    def load(self, key: Any) -> Any:
        """What was kept, or None."""
        return super().load(self._whole(key))

    def save(self, key: Any, data: Any) -> None:
        """Under a name of its own, and before the index tells of it: who reads meanwhile finds the old code, or none."""
        whole = self._whole(key)
        name = f"{self._base}.{hashlib.sha256(repr(whole).encode()).hexdigest()[:16]}.nbc"
        self._save_data(name, data)
        entries = self._load_index()
        old = [other for other in entries if _same(other, whole) and entries[other] != name]
        self._save_index({other: file for other, file in entries.items() if other not in old} | {whole: name})
        for other in old:
            with contextlib.suppress(OSError):
                os.unlink(self._data_path(entries[other]))


def _same(entry: Any, whole: Any) -> bool:
    """Whether two entries are of one function, types and CPU, whatever the function is made of."""
    (types, cpu, (_, around)), (own_types, own_cpu, (_, own_around)) = entry[0], whole[0]
    return bool((types, cpu, around) == (own_types, own_cpu, own_around))
