"""How the index's functions are compiled: without the GIL, cached on disk, and without counting references to arrays.

Numba counts a reference whenever an array, or a tuple with arrays in it, is handed to a function or taken out of a tuple; by
an atomic instruction each time, in loops over keys. Those counts were a third of a look-up, half of an eviction under ARC and
three quarters of pinning. The arrays of an index outlive every call, so nothing needs counting; what has to make an array of
its own is compiled by plain ``njit``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from numba.core.options import DefaultOptions

from kvortex.jit import njit

_F = TypeVar("_F", bound=Callable[..., object])


def compiled(function: _F) -> _F:
    """A compiled function that makes no arrays."""
    return _njit(function, {"_nrt": False})


def inlined(function: _F) -> _F:
    """Likewise, for what is called once a key with a tuple of arrays: it becomes part of its caller.

    Otherwise all pointers, shapes and strides of the tuple are copied for each call, a hundred words and more.
    """
    return _njit(function, {"_nrt": False, "forceinline": True})


def _njit(function: _F, options: dict[str, bool]) -> _F:
    # Neither option is in Numba's manual. Without them all is slower, and otherwise the same.
    known = {name: value for name, value in options.items() if hasattr(DefaultOptions, name)}
    made: _F = njit(nogil=True, **known)(function)
    return made
