"""Which new keys are stored at all: those that have been offered before.

What is asked for only once fills a pool for nothing. With ``admit_after = n`` a key is stored at the n-th time that ``reserve``
is asked for it while it is nowhere; before, it is only remembered, as a ghost with the number of its offers. Four times as
many keys are remembered as there are slots (what comes back later than that would have been evicted by then), and for each one
more the one whose last offer is the longest ago is forgotten. A key that is admitted is forgotten as well, so once it was
evicted, dropped or aborted it is offered anew.

All keys of a batch are judged by what was remembered before the batch; then they are remembered from last to first, so
the tail of a prefix is forgotten before its head.

Memory: four ghosts of 32 bytes a slot, or nothing where n is 1.
"""

from __future__ import annotations

from kvortex.index import _ghosts
from kvortex.index._compiled import compiled
from kvortex.index._ghosts import MOST_MARK, Ghosts, new_ghosts

MOST_OFFERS = MOST_MARK
_KEYS_A_SLOT = 4
_MOST_KEYS = 1 << 30  # rows are linked by int32


def new_offers(slots: int, admit_after: int) -> Ghosts:
    """An empty memory of offers."""
    return new_ghosts(min(_KEYS_A_SLOT * slots, _MOST_KEYS) if admit_after > 1 else 0, 1)


@compiled
def admits(offers: Ghosts, print_: int, admit_after: int) -> bool:
    """Whether the offer that is made now is the ``admit_after``-th. Changes nothing."""
    if admit_after <= 1:
        return True
    row = _ghosts.seek(offers, print_)
    return (_ghosts.mark_of(offers, row) if row >= 0 else 0) + 1 >= admit_after


@compiled
def settle(offers: Ghosts, print_: int, admitted: bool, slots: int) -> None:
    """Forgets a key that is admitted, and remembers one more offer of another. ``slots`` are there now."""
    row, count = _ghosts.seek(offers, print_), 0
    if row >= 0:
        count = _ghosts.mark_of(offers, row)
        _ghosts.take(offers, 0, row)
    most = min(_KEYS_A_SLOT * slots, _MOST_KEYS)
    if admitted or most == 0:
        return
    if _ghosts.length(offers, 0) >= most:
        _ghosts.take_oldest(offers, 0)
    _ghosts.add(offers, 0, print_, count + 1)
