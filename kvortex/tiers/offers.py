"""Which blocks a tier is offered often enough to store."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.index import NEW, BlockIndex
from kvortex.keys import KeyArray
from kvortex.tiers.metrics import Tally
from kvortex.tiers.options import TierOptions


class Offers:
    """Counts offers of each key, of ``options.known_keys`` lately. Thread-safe."""

    def __init__(self, options: TierOptions, tally: Tally) -> None:
        self._tally = tally
        self._index = BlockIndex(options.known_keys, admit_after=options.admit_after) if options.admit_after > 1 else None

    def admitted(self, keys: KeyArray) -> npt.NDArray[np.bool_]:
        """(n,) bool: which of these keys' offers is the ``admit_after``-th; the others are counted as dropped."""
        if self._index is None or not len(keys):
            return np.ones(len(keys), bool)
        found = self._index.reserve(keys)
        admitted = found.status == NEW
        self._index.abort(found.slots[admitted])
        self._tally.drop("admission", int((~admitted).sum()))
        return np.asarray(admitted)
