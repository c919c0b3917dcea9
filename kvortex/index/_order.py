"""State that every eviction policy works on: the lines of all slots, a few numbers, and ghosts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvortex.index._ghosts import Ghosts
from kvortex.index._lines import Cells, Shorts, Words

# Rows of Order.head; the policy's own begin with OWN.
KIND, THERE, SLOTS, OWN = 0, 1, 2, 3

FRESH = 0  # origin of a key that a policy does not remember; others are the policy's


class Order(NamedTuple):
    """Who goes next. ``words``, ``cells`` and ``shorts`` are the index's own lines, with the policy's joints behind them."""

    words: Words
    cells: Cells
    shorts: Shorts
    head: npt.NDArray[np.int64]  # (OWN + the policy's,): the policy's kind, slots that are there, slots; then its own
    ghosts: Ghosts
