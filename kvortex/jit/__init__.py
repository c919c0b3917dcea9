"""``njit`` whose machine code is kept on disk, and used for as long as all that it was made of stays the same.

Numba's own cache asks for the time and the length of the file that a function is in. But what a function calls, and every
constant that it names, is compiled into it, from whichever file: after an update of a checkout, which writes anew only the
files that differ, callers went on with the old machine code of what they call. Here what is kept goes by a digest of all of
that (:mod:`kvortex.jit.stamp`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

from kvortex.jit.kept import Kept

__all__ = ["njit"]


def njit(*, cache: bool = True, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """As ``numba.njit``.

    Parameters
    ----------
    cache
        Whether machine code is kept on disk, where Numba keeps its own.
    **options
        Of ``numba.njit``.
    """

    def compile_later(function: Callable[..., Any]) -> Any:
        made: Any = numba.njit(**options)(function)
        if cache and hasattr(made, "py_func"):  # with NUMBA_DISABLE_JIT it is the function itself
            made.enable_caching()
            made._cache._cache_file = Kept(made)
        return made

    return compile_later
