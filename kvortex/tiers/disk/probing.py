"""Whether the disks work: a record of the probe's own, written and read back on each."""

from __future__ import annotations

import mmap

import numpy as np

from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.disk.crew import Crew
from kvortex.tiers.disk.pages import PAGE, Pages
from kvortex.tiers.disk.slab import PROBE
from kvortex.tiers.disk.store import Store


def probe(store: Store, readers: Crew, writers: Crew, token: bytes, call: Call) -> str | None:
    """None, or what is wrong with which folder. ``token`` is new each time, so that an old record does not pass for it."""
    troubles: list[str] = []
    memory = np.frombuffer(mmap.mmap(-1, 2 * PAGE * len(store.slabs)), np.uint8).reshape(len(store.slabs), 2, PAGE)
    memory[:, 0, : len(token)] = np.frombuffer(token, np.uint8)

    def write(at: int, pages: Pages) -> None:
        pages.put_header(token)
        try:
            store.slabs[at].write(PROBE, memory[at, 0].ctypes.data, PAGE, pages)
        except OSError as error:
            troubles.append(f"{store.slabs[at].folder}: writing: {error.strerror or error}")

    def read(at: int, pages: Pages) -> None:
        try:
            store.slabs[at].read(PROBE, memory[at, 1].ctypes.data, PAGE, pages)
        except OSError as error:
            troubles.append(f"{store.slabs[at].folder}: reading: {error.strerror or error}")
            return
        if (memory[at, 1] != memory[at, 0]).any() or bytes(pages.header[: len(token)]) != token:
            troubles.append(f"{store.slabs[at].folder}: what was written is not what is read")

    for crew, step in ((writers, write), (readers, read)):
        _, why = crew.run(step, len(store.slabs), call)
        if why != Outcome.OK:
            troubles.append(f"not done: {why.name.lower()}")
        if troubles:
            return "; ".join(troubles)
    return None
