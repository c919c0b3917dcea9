"""A profile: what is known of a GPU and its link, measured once or guessed, that transfers are shaped by."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kvortex.transfer.executor import Direction
from kvortex.transfer.layers import Least
from kvortex.transfer.routes import Ranking, Route

# For guesses, and for lines. What things cost beside their bytes was seen on one GPU (docs/transfers.md) and follows from how
# GPUs of today are built, more than from which one it is; how many bytes that is worth follows from the link.
_LINK_RATE = 25e9  # bytes per second, where the system does not say: 16 lanes of PCIe 4
_SHARE = 0.87  # of what a link carries, left for payload by packets of 256 bytes
_COPY_S = 4.8e-6  # a call of the driver for one copy, several times over: so long a copy is worth it
_LINE_S, _BATCHED_S = 40e-9, 150e-9  # a line of a 2D DMA, and a copy of a batch
WORTH = 8  # times what it costs is what a line or copy should take
_START_S = 75e-6  # a gather, a DMA and the gap between them
_CHUNK_S = 0.6e-3  # of a staging buffer, against a few microseconds from each to the next
STAGED_CTAS_EACH = 2  # of a multiprocessor at most, for one launch: twice as many cost models more, and bring nothing
_GROUP_COPIES = 8  # as much as the end of one group and the beginning of the next are worth

KERNEL_S = 4e-3  # the kernels of models end after less than that, mostly
_RESIDENT_PART = 4  # of the multiprocessors at most are for one resident kernel


@dataclass(frozen=True)
class Profile:
    """How transfers are shaped on one GPU.

    Parameters
    ----------
    measured
        Whether it was measured, or guessed.
    link_rate
        Bytes per second of one long DMA, in the slower direction.
    line_bytes, copy_bytes, group_bytes
        A line of a 2D DMA (never measured), a single DMA, and a group of layers in all records: each takes hardly longer than
        its bytes do from so many on.
    streams, buffers
        Of each direction; buffers are staging buffers.
    buffer_bytes
        Of one staging buffer.
    staged_ctas
        Most CTAs of a launch that serves one staging buffer.
    resident_ctas, resident_ctas_beside
        Of a kernel that serves all of them, and of one beside a computing model.
    rankings
        For both directions, with and without compute; for each length of fragments one that holds from 0 bytes on, and a
        length of 0 among them.

    Raises
    ------
    ValueError
        A number is not above 0 or no number, or there are transfers that no ranking is for, or two are.
    """

    measured: bool
    link_rate: float
    line_bytes: int
    copy_bytes: int
    group_bytes: int
    streams: int
    buffers: int
    buffer_bytes: int
    staged_ctas: int
    resident_ctas: int
    resident_ctas_beside: int
    rankings: tuple[Ranking, ...]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not isinstance(value, int):
                raise ValueError(f"{field.name} = {value}")
            if field.name not in ("measured", "rankings") and not 0 < value < math.inf:
                raise ValueError(f"{field.name} = {value}")
        for direction in Direction:
            for beside in (False, True):
                mine = [row for row in self.rankings if row.direction is direction and row.beside_compute is beside]
                lengths = {row.fragment_bytes for row in mine}
                if 0 not in lengths or lengths != {row.fragment_bytes for row in mine if row.nbytes == 0}:
                    raise ValueError(f"rankings of {direction.value}s that some transfers are not in")
                if len({(row.fragment_bytes, row.nbytes) for row in mine}) < len(mine):
                    raise ValueError(f"rankings of {direction.value}s that some transfers are in twice")

    @property
    def staging_bytes(self) -> int:
        """Of the staging buffers of both directions."""
        return 2 * max(self.buffers, self.streams) * self.buffer_bytes

    @property
    def least(self) -> Least:
        """What layers are worth moving by themselves."""
        return Least(self.line_bytes, self.copy_bytes, self.group_bytes)

    def is_deep(self, staged: int) -> bool:
        """Whether so many bytes of staging buffers keep the link busy until the next kernel of a model ends."""
        return staged >= self.link_rate * KERNEL_S


def to_plain(profile: Profile) -> dict[str, Any]:
    """A profile as JSON takes it."""
    plain = dataclasses.asdict(profile)
    plain["rankings"] = [
        [row.direction.value, row.beside_compute, row.fragment_bytes, row.nbytes, [route.value for route in row.routes]]
        for row in profile.rankings
    ]
    return plain


def from_plain(plain: Any) -> Profile:
    """The reverse of :func:`to_plain`; ValueError, TypeError, KeyError or OverflowError for anything else."""
    rankings = tuple(
        Ranking(Direction(direction), bool(beside), int(fragment), int(nbytes), tuple(Route(route) for route in routes))
        for direction, beside, fragment, nbytes, routes in plain["rankings"]
    )
    return Profile(**{**plain, "rankings": rankings})


def guess(link: float | None, multiprocessors: int) -> Profile:
    """A profile for a GPU that was not measured.

    Parameters
    ----------
    link
        Bytes per second that the link carries one way, packets and all; None where nobody knows.
    multiprocessors
        Of the GPU.
    """
    rate = _LINK_RATE if link is None else _SHARE * link
    line, copy = _round(WORTH * _LINE_S * rate), _round(_COPY_S * rate)
    return Profile(
        measured=False,
        link_rate=rate,
        line_bytes=line,
        copy_bytes=copy,
        group_bytes=_GROUP_COPIES * copy,
        streams=2,
        buffers=4,
        buffer_bytes=max(4096, _round(_CHUNK_S * rate)),
        staged_ctas=STAGED_CTAS_EACH * multiprocessors,
        resident_ctas=min(4, most_resident_ctas(multiprocessors)),
        resident_ctas_beside=min(2, most_resident_ctas(multiprocessors)),
        rankings=_guessed_rankings(line, *(_round(seconds * rate) for seconds in (WORTH * _BATCHED_S, _START_S))),
    )


def most_resident_ctas(multiprocessors: int) -> int:
    """CTAs that a resident kernel may have.

    They wait for each other through the link, so all of them must find room at once, and each takes a multiprocessor to
    itself. Kernels of both directions, and of another engine, that had half of their CTAs each on a GPU too small for all
    would wait for ever.
    """
    return max(1, multiprocessors // _RESIDENT_PART)


def _round(nbytes: float) -> int:
    """The power of two that is nearest."""
    exponent = max(0, int(nbytes).bit_length() - 1)
    return 1 << (exponent + (nbytes > 1.5 * (1 << exponent)))


def _guessed_rankings(line: int, batched: int, little: int) -> tuple[Ranking, ...]:
    """From lengths of lines of a 2D DMA and of copies in a batch that are worth it, and a payload that is not worth staging."""
    mapped, staged, resident, by_lines, by_copies = Route.MAPPED, Route.STAGED, Route.RESIDENT, Route.STRIDED, Route.BATCHED
    long = resident, staged, mapped
    idle = {0: ((mapped, resident, staged), long), line: ((by_lines, mapped, resident, staged), long)}
    beside = {  # a kernel would have to wait for the model's, and keeps multiprocessors
        0: ((mapped, resident, staged), (staged, resident)),
        line: ((by_lines, mapped, resident, staged), (staged, by_lines, resident)),
        max(line + 1, batched): ((by_lines, by_copies, mapped, resident, staged), (staged, by_lines, by_copies, resident)),
    }
    return tuple(
        Ranking(direction, busy, fragment, nbytes, routes)
        for direction in Direction
        for busy, table in ((False, idle), (True, beside))
        for fragment, pair in table.items()
        for nbytes, routes in zip((0, little + 1), pair, strict=True)
    )
