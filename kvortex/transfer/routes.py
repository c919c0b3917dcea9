"""Routes: how the bytes of scattered blocks cross the link, and which one serves a transfer."""

from __future__ import annotations

import bisect
import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from kvortex.transfer.executor import Direction


class Route(enum.Enum):
    """What a transfer goes by.

    ``DIRECT``
        One contiguous DMA a record, for records that are one long fragment.
    ``STAGED``
        A gather kernel fills staging buffers in VRAM, and each leaves in one DMA. A launch for each buffer: while a model
        computes it waits for the end of the model's kernel, and takes nothing from the next one.
    ``RESIDENT``
        The same with one launch for all buffers: it waits once, and then keeps few multiprocessors busy. The fastest.
    ``STRIDED``
        One DMA for all fragments of a block that lie equally far apart. Needs no multiprocessor and starts at once.
    ``BATCHED``
        One DMA a fragment, wherever it lies, in one call of the driver for each stream. Needs no multiprocessor and starts at
        once. A call for each DMA where the driver has no such function.
    ``MAPPED``
        A kernel reads or writes the pinned pool over the link. Little latency.
    """

    DIRECT = "direct"
    STAGED = "staged"
    RESIDENT = "resident"
    STRIDED = "strided"
    BATCHED = "batched"
    MAPPED = "mapped"


@dataclass(frozen=True)
class Ranking:
    """Which routes serve one kind of transfers, the best first.

    Parameters
    ----------
    direction, beside_compute
        Of the transfers, and whether the GPU is busy with something else.
    fragment_bytes, nbytes
        For transfers from this mean length of a fragment on, and from this payload on.
    routes
        Without repetition; ``STAGED``, which always can run, among them.
    """

    direction: Direction
    beside_compute: bool
    fragment_bytes: int
    nbytes: int
    routes: tuple[Route, ...]

    def __post_init__(self) -> None:
        if Route.STAGED not in self.routes or Route.DIRECT in self.routes or len(set(self.routes)) != len(self.routes):
            raise ValueError(f"a ranking of {[route.value for route in self.routes]}")
        if self.fragment_bytes < 0 or self.nbytes < 0:
            raise ValueError("a ranking from less than nothing on")


@dataclass(frozen=True)
class Ability:
    """What a layout, a device and its staging buffers allow.

    Parameters
    ----------
    fragment_bytes
        Mean length of the layout's fragments.
    strided
        Whether fragments lie so evenly that few rectangles hold them.
    batched
        Whether the driver takes many copies in one call.
    resident
        Whether resident kernels can run.
    deep
        Whether staging buffers keep the link busy until the next kernel of a model ends.
    """

    fragment_bytes: int
    strided: bool
    batched: bool
    resident: bool
    deep: bool


# Direction, beside compute, layer-wise; then payloads from which on a route is the best one that is possible.
Table: TypeAlias = "dict[tuple[Direction, bool, bool], tuple[list[int], list[Route]]]"


def tabulate(rankings: Iterable[Ranking], ability: Ability) -> Table:
    """What :func:`choose` chooses from: of rankings those for this length of fragments, of routes those that are possible."""
    all_of_them = list(rankings)
    table: Table = {}
    for direction in Direction:
        for beside in (False, True):
            mine = [row for row in all_of_them if row.direction is direction and row.beside_compute is beside]
            length = max(row.fragment_bytes for row in mine if row.fragment_bytes <= ability.fragment_bytes)
            rows = sorted((row.nbytes, row.routes) for row in mine if row.fragment_bytes == length)
            for layerwise in (False, True):
                best = [_possible(routes, ability, beside_compute=beside, layerwise=layerwise)[0] for _, routes in rows]
                table[direction, beside, layerwise] = [nbytes for nbytes, _ in rows], best
    return table


def _possible(routes: tuple[Route, ...], ability: Ability, *, beside_compute: bool, layerwise: bool) -> list[Route]:
    """Those that can run. One DMA or batch takes all layers of a block at once, which is no use to who waits for the first."""
    can = {
        Route.STRIDED: ability.strided and not layerwise,
        Route.BATCHED: ability.batched and not layerwise,
        Route.RESIDENT: ability.resident,
    }
    found = [route for route in routes if can.get(route, True)]
    if beside_compute and not ability.deep:  # the link stands still until the next kernel ends, so only better than nothing
        behind = found[found.index(Route.STAGED) + 1 :]
        found.remove(Route.STAGED)
        found.insert(found.index(Route.MAPPED) if Route.MAPPED in behind else len(found), Route.STAGED)
    return found


def choose(table: Table, direction: Direction, nbytes: int, *, beside_compute: bool, layerwise: bool = False) -> Route:
    """The route of one transfer of ``nbytes`` of payload.

    Parameters
    ----------
    table
        Of :func:`tabulate`.
    direction, nbytes
    beside_compute
        Whether the GPU is busy with something else.
    layerwise
        Whether the first layers are wanted before the last ones.
    """
    least, routes = table[direction, beside_compute, layerwise]
    return routes[bisect.bisect_right(least, nbytes) - 1]
