"""Every eviction policy and admission, in dictionaries: what the compiled ones must do, key by key and slot by slot.

Nothing here imports kvortex. ``NaiveIndex`` (tests/naive.py) tells these classes what kvortex's index tells its policies.
Queues are dicts, whose order is that of insertion: oldest first. Below are the same policies once more as their papers
write them, for one request after another and without pins.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

Queue = dict[Any, None]


def pop_oldest(queue: dict[Any, Any]) -> Any:
    oldest = next(iter(queue))
    del queue[oldest]
    return oldest


class NaiveLRU:
    """Also what the others share. A record has ``key`` and ``pins``; ``slots`` is how many there are now."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.ring: Queue = {}

    def queues(self) -> list[list[Any]]:
        return [list(self.ring)]

    def miss(self, key: Any) -> str:
        return "fresh"

    def expect(self, record: Any, origin: str) -> None: ...
    def abandon(self, record: Any) -> None: ...
    def use(self, record: Any) -> None: ...

    def admit(self, record: Any) -> None:
        self.ring[record] = None

    def pin(self, record: Any) -> None:
        del self.ring[record]

    def unpin(self, record: Any) -> None:
        self.admit(record)

    def forget(self, record: Any) -> None:
        if not record.pins:
            self.pin(record)
        self.abandon(record)

    def evict(self, origin: str) -> Any:
        return pop_oldest(self.ring)


class NaiveLFU(NaiveLRU):
    MOST = 1023

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.uses: dict[Any, int] = {}
        self.rings: dict[int, Queue] = {}  # by uses; none is empty

    def queues(self) -> list[list[Any]]:
        return [list(self.rings[uses]) for uses in sorted(self.rings)]

    def expect(self, record: Any, origin: str) -> None:
        self.uses[record] = 1

    def use(self, record: Any) -> None:
        self.uses[record] = min(self.MOST, self.uses[record] + 1)

    def admit(self, record: Any) -> None:
        self.rings.setdefault(self.uses[record], {})[record] = None

    def pin(self, record: Any) -> None:
        ring = self.rings[self.uses[record]]
        del ring[record]
        if not ring:
            del self.rings[self.uses[record]]

    def evict(self, origin: str) -> Any:
        record = next(iter(self.rings[min(self.rings)]))
        self.pin(record)
        return record


class NaiveS3FIFO(NaiveLRU):
    """A queue holds its pinned records too, until eviction looks at them; ``parked`` are those it has looked at."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.small: Queue = {}
        self.main: Queue = {}
        self.parked: set[Any] = set()
        self.belongs: dict[Any, str] = {}  # every record, reserved ones too
        self.size = Counter[str]()
        self.uses: dict[Any, int] = {}
        self.ghosts: dict[Any, None] = {}

    def queues(self) -> list[list[Any]]:
        return [list(self.small), list(self.main)]

    def share(self) -> int:
        return max(1, self.slots // 10)

    def of(self, record: Any) -> Queue:
        return self.small if self.belongs[record] == "small" else self.main

    def miss(self, key: Any) -> str:
        if key in self.ghosts:
            del self.ghosts[key]
            return "ghost"
        return "fresh"

    def expect(self, record: Any, origin: str) -> None:
        self.belongs[record] = "main" if origin == "ghost" else "small"
        self.size[self.belongs[record]] += 1
        self.uses[record] = 0

    def abandon(self, record: Any) -> None:
        self.size[self.belongs.pop(record)] -= 1

    def admit(self, record: Any) -> None:
        self.of(record)[record] = None

    def pin(self, record: Any) -> None: ...

    def use(self, record: Any) -> None:
        self.uses[record] = min(3, self.uses[record] + 1)

    def unpin(self, record: Any) -> None:
        if record in self.parked:
            self.parked.remove(record)
            self.admit(record)

    def forget(self, record: Any) -> None:
        self.of(record).pop(record, None)
        self.parked.discard(record)
        self.abandon(record)

    def evict(self, origin: str) -> Any:
        while True:
            if not self.main or (self.small and self.size["small"] >= self.share()):
                record = pop_oldest(self.small)
                if record.pins:
                    self.parked.add(record)
                elif self.uses[record] > 1:
                    self.abandon(record)
                    self.expect(record, "ghost")
                    self.main[record] = None
                else:
                    self.abandon(record)
                    self.remember(record.key)
                    return record
            else:
                record = pop_oldest(self.main)
                if record.pins:
                    self.parked.add(record)
                elif self.uses[record] > 0:
                    self.uses[record] -= 1
                    self.main[record] = None
                else:
                    self.abandon(record)
                    return record

    def remember(self, key: Any) -> None:
        self.ghosts[key] = None
        if len(self.ghosts) > self.slots - self.share():
            pop_oldest(self.ghosts)


class NaiveARC(NaiveLRU):
    """``t`` is T1 and T2, ``b`` is B1 and B2; ``belongs`` says 0 or 1 of every record, reserved and pinned ones too."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.t: tuple[Queue, Queue] = ({}, {})
        self.b: tuple[dict[Any, None], dict[Any, None]] = ({}, {})
        self.belongs: dict[Any, int] = {}
        self.size = Counter[int]()
        self.p = 0

    def queues(self) -> list[list[Any]]:
        return [list(queue) for queue in self.t]

    def miss(self, key: Any) -> str:
        (b1, b2), c = self.b, self.slots
        if key in b1:
            self.p = min(c, self.p + max(1, len(b2) // len(b1)))
            del b1[key]
            return "b1"
        if key in b2:
            self.p = max(0, self.p - max(1, len(b1) // len(b2)))
            del b2[key]
            return "b2"
        if self.size[0] + len(b1) >= c:
            if not b1:
                return "no ghost"
            pop_oldest(b1)
        elif b2 and len(self.belongs) + len(b1) + len(b2) >= 2 * c:
            pop_oldest(b2)
        return "fresh"

    def expect(self, record: Any, origin: str) -> None:
        self.belongs[record] = int(origin in ("b1", "b2"))
        self.size[self.belongs[record]] += 1

    def abandon(self, record: Any) -> None:
        self.size[self.belongs.pop(record)] -= 1

    def admit(self, record: Any) -> None:
        self.t[self.belongs[record]][record] = None

    def pin(self, record: Any) -> None:
        del self.t[self.belongs[record]][record]

    def use(self, record: Any) -> None:
        self.abandon(record)
        self.expect(record, "b1")

    def evict(self, origin: str) -> Any:
        t1 = self.size[0]
        which = 0 if origin == "no ghost" or t1 > self.p or (origin == "b2" and t1 == self.p) else 1
        which = which if self.t[which] else 1 - which
        record = pop_oldest(self.t[which])
        self.abandon(record)
        if origin != "no ghost":
            if len(self.b[0]) + len(self.b[1]) == self.slots:
                pop_oldest(self.b[1] or self.b[0])
            self.b[which][record.key] = None
        return record


NAIVE_POLICIES: dict[str, type[NaiveLRU]] = {"lru": NaiveLRU, "s3fifo": NaiveS3FIFO, "arc": NaiveARC, "lfu": NaiveLFU}


class NaiveAdmission:
    """Offers of keys that are nowhere, the one whose last is the longest ago first."""

    def __init__(self, most: int, admit_after: int) -> None:
        self.most, self.admit_after = most, admit_after
        self.offers: OrderedDict[Any, int] = OrderedDict()

    def admits(self, key: Any) -> bool:
        return self.offers.get(key, 0) + 1 >= self.admit_after

    def settle(self, key: Any, admitted: bool) -> None:
        count = self.offers.pop(key, 0)
        if not admitted:
            self.offers[key] = count + 1
            if len(self.offers) > self.most:
                self.offers.popitem(last=False)


# -- as the papers have them


class PaperLRU:
    def __init__(self, capacity: int) -> None:
        self.c = capacity
        self.queue: OrderedDict[Any, None] = OrderedDict()

    def request(self, x: Any) -> bool:
        hit = x in self.queue
        if hit:
            self.queue.move_to_end(x)
        else:
            if len(self.queue) == self.c:
                self.queue.popitem(last=False)
            self.queue[x] = None
        return hit


class PaperLFU:
    """Shah, Mitra and Matani 2010: counts, and recency among equals."""

    def __init__(self, capacity: int) -> None:
        self.c, self.now = capacity, 0
        self.uses: Counter[Any] = Counter()
        self.last: dict[Any, int] = {}

    def request(self, x: Any) -> bool:
        hit, self.now = x in self.last, self.now + 1
        if not hit and len(self.last) == self.c:
            victim = min(self.last, key=lambda y: (self.uses[y], self.last[y]))
            del self.last[victim], self.uses[victim]
        self.uses[x] += 1
        self.last[x] = self.now
        return hit


class PaperS3FIFO:
    """Yang et al. 2023, algorithm 1; but a look at a queue ends when one record is out, S then being below its share or not."""

    def __init__(self, capacity: int) -> None:
        self.c, self.s_size = capacity, max(1, capacity // 10)
        self.small: list[Any] = []  # tails first
        self.main: list[Any] = []
        self.ghost: list[Any] = []
        self.freq: dict[Any, int] = {}

    def request(self, x: Any) -> bool:
        if x in self.freq:
            self.freq[x] = min(self.freq[x] + 1, 3)
            return True
        ghost = x in self.ghost  # before room is made, which may push it out
        if ghost:
            self.ghost.remove(x)
        while len(self.small) + len(self.main) >= self.c:
            if not self.main or (self.small and len(self.small) >= self.s_size):
                self.evict_small()
            else:
                self.evict_main()
        (self.main if ghost else self.small).append(x)
        self.freq[x] = 0
        return False

    def evict_small(self) -> None:
        tail = self.small.pop(0)
        if self.freq[tail] > 1:
            self.main.append(tail)
            self.freq[tail] = 0
        else:
            del self.freq[tail]
            self.ghost.append(tail)
            if len(self.ghost) > self.c - self.s_size:
                self.ghost.pop(0)

    def evict_main(self) -> None:
        tail = self.main.pop(0)
        if self.freq[tail] > 0:
            self.freq[tail] -= 1
            self.main.append(tail)
        else:
            del self.freq[tail]


class PaperARC:
    """Megiddo and Modha 2003, figure 4, with whole numbers for p. Lists have their LRU page first."""

    def __init__(self, capacity: int) -> None:
        self.c, self.p = capacity, 0
        self.t1: list[Any] = []
        self.t2: list[Any] = []
        self.b1: list[Any] = []
        self.b2: list[Any] = []

    def replace(self, x: Any) -> None:
        if self.t1 and (len(self.t1) > self.p or (x in self.b2 and len(self.t1) == self.p)):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def request(self, x: Any) -> bool:
        for t in (self.t1, self.t2):
            if x in t:
                t.remove(x)
                self.t2.append(x)
                return True
        if x in self.b1:
            self.p = min(self.c, self.p + max(1, len(self.b2) // len(self.b1)))
            self.replace(x)
            self.b1.remove(x)
            self.t2.append(x)
            return False
        if x in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) // len(self.b2)))
            self.replace(x)
            self.b2.remove(x)
            self.t2.append(x)
            return False
        l1, l2 = len(self.t1) + len(self.b1), len(self.t2) + len(self.b2)
        if l1 == self.c:
            if len(self.t1) < self.c:
                self.b1.pop(0)
                self.replace(x)
            else:
                self.t1.pop(0)
        elif l1 + l2 >= self.c:
            if l1 + l2 == 2 * self.c:
                self.b2.pop(0)
            self.replace(x)
        self.t1.append(x)
        return False


PAPERS: dict[str, Any] = {"lru": PaperLRU, "s3fifo": PaperS3FIFO, "arc": PaperARC, "lfu": PaperLFU}
