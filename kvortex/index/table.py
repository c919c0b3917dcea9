"""The index that an engine uses: batches of keys in, slots out, every call atomic."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from kvortex.arguments import LARGEST
from kvortex.errors import ArgumentError, ConfigError, IndexStateError, PoolFullError, shown
from kvortex.index import _reads, core
from kvortex.index._check import PROBLEMS, first_problem
from kvortex.index._hash import scratch
from kvortex.index._lines import DOOMED, FREE, PINS, RESERVED, RESIDENT, SIZE, STATE
from kvortex.index.admission import MOST_OFFERS
from kvortex.index.policies import POLICIES
from kvortex.keys import KeysLike, as_keys

MAX_CAPACITY = 1 << 30  # lines are linked by int32
_STATES = {FREE: "free", RESERVED: "reserved", RESIDENT: "resident", DOOMED: "dropped"}
Once: TypeAlias = npt.NDArray[np.uint8]
SlotsLike: TypeAlias = npt.NDArray[Any] | Sequence[int]


_OWNERS = 2**63


class Reservation(NamedTuple):
    """What :meth:`BlockIndex.reserve` found or made, one entry a key.

    ``slots`` is (n,) int64. ``status`` is (n,) uint8: ``NEW`` (the slot is yours to fill, then commit or abort),
    ``RESIDENT`` (the bytes are there already), ``PENDING`` (another reservation is filling that slot), ``DECLINED`` (the key
    has not been offered often enough; the slot is -1). ``owners`` is (n,) int64: the number that was given with the
    reservation which filled, or fills, the slot; your own where there is none.
    """

    slots: npt.NDArray[np.int64]
    status: npt.NDArray[np.uint8]
    owners: npt.NDArray[np.int64]


class IndexCounts(NamedTuple):
    """Slots by state at one moment: ``free + reserved + resident == capacity``, without those that are not there yet.

    ``resident`` includes dropped records that are still pinned; ``pinned`` counts slots, not pins; ``evictions`` is
    the total since the index was made.
    """

    capacity: int
    free: int
    reserved: int
    resident: int
    pinned: int
    evictions: int


class BlockIndex:
    """Which key lies in which slot of a pool, who holds it, and what is evicted next.

    A slot is *free*, then *reserved* for one key while its bytes are being written, then *resident*: only now is the
    key visible. A resident slot that is pinned is never evicted and never handed out. What is evicted next is the policy's
    choice (:mod:`kvortex.index.policies`), and one batch counts as used from its last key to its first, so the tail of a
    prefix goes before its head. A key counts as used once each time that :meth:`acquire` or :meth:`reserve` finds it, and its
    place among others is that of its last release.

    Parameters
    ----------
    capacity
        Slots in the pool, from 1 to 2**30.
    policy
        Name of the eviction policy: ``"lru"``, ``"s3fifo"``, ``"arc"`` or ``"lfu"``. Their classes in
        :data:`kvortex.index.POLICIES` say what each does, and what memory it takes.
    admit_after
        A key that is nowhere gets a slot at the n-th time that :meth:`reserve` is asked for it, from 1 to 255; see
        :mod:`kvortex.index.admission`.
    ready
        The first so many slots are there; None for all. :meth:`grow` adds others.

    Raises
    ------
    ConfigError
        An unknown policy, or an impossible number.

    Notes
    -----
    Threads: every method may be called from any thread, and each is atomic: it happens entirely before or after any
    other. A call is one compiled function that runs without the GIL, under one lock; :meth:`lookup` and :meth:`match` take
    that only where writers kept them from seeing one state of the table, so any number of them run at once. Arrays that are
    handed in must not be written to by others during the call, and are not kept; arrays that are returned are new.

    Keys are an (n, 32) uint8 array or a sequence of 32-byte ``bytes``; slots are 1-d integers. Other things raise
    ArgumentError. Memory: 100 bytes a slot (a line of 64, four buckets of 8, free stack 4), under S3-FIFO 29 more, under ARC
    32, and 128 more where ``admit_after`` is above 1; and at most 66 KiB that do not depend on the capacity.
    """

    def __init__(self, capacity: int, policy: str = "lru", *, admit_after: int = 1, ready: int | None = None) -> None:
        self.capacity = _integer("capacity", capacity, MAX_CAPACITY)
        self.admit_after = _integer("admit_after", admit_after, MOST_OFFERS)
        if not isinstance(policy, str) or policy not in POLICIES:
            raise ConfigError(f"policy = {shown(policy)}: unknown; known are {', '.join(sorted(POLICIES))}")
        self.policy = policy
        self.ready = self.capacity if ready is None else _integer("ready", ready, self.capacity, least=0)
        self._table = core.new_table(self.capacity, POLICIES[policy], self.ready, self.admit_after)
        # Re-entrant, because the garbage collector may run a finaliser that releases a pin in a thread that is just
        # taking the lock. The compiled call is all that the lock guards, and no Python runs inside that.
        self._lock = threading.RLock()
        table = self._table
        self._view = (table.sequence, table.buckets, table.words, table.shorts)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the index."""
        table = self._table
        own = (table.words, table.buckets, table.stack, table.counters, table.sequence, table.order.head)
        ghosts = [array for each in (table.order.ghosts, table.offers) for array in (each.prints, each.buckets, each.head)]
        return sum(array.nbytes for array in own) + sum(array.nbytes for array in ghosts)

    def grow(self, ready: int) -> None:
        """The first ``ready`` slots are there from now on, up to the capacity. Slots never go.

        Raises
        ------
        ConfigError
            It is no integer, or below 0.
        """
        more = min(_integer("ready", ready, None, least=0), self.capacity)
        with self._lock:
            core.grow(self._table, more)
            self.ready = max(self.ready, more)

    def lookup(self, keys: KeysLike) -> npt.NDArray[np.bool_]:
        """Which keys are resident, as (n,) bool. Changes nothing, not even the eviction order."""
        words = _words(keys)
        found = np.empty(len(words), np.bool_)
        if not _reads.lookup(*self._view, words, found):
            with self._lock:  # no writer is at work now
                done = _reads.lookup(*self._view, words, found)
            assert done
        return found

    def match(self, keys: KeysLike) -> int:
        """How many keys from the first on are resident without a gap. Changes nothing."""
        words = _words(keys)
        run = int(_reads.match(*self._view, words))
        if run < 0:
            with self._lock:
                run = int(_reads.match(*self._view, words))
            assert run >= 0
        return run

    def reserve(
        self, keys: KeysLike, nbytes: int | npt.ArrayLike = 0, *, owner: int = 0, taken: npt.NDArray[np.int64] | None = None
    ) -> Reservation:
        """Slots for keys that are to be written; what is there already is found instead.

        A key that is nowhere gets a free slot, or that of the next evicted record, and stays invisible until
        :meth:`commit`. Exactly as many records are evicted as slots are missing, none of them a key of this batch.
        Keys that are resident count as used, and get no pin. Keys that admission declines get no slot, and the offer is
        remembered.

        Parameters
        ----------
        keys
            n keys, all different.
        nbytes
            Length in bytes of each record, one for all or (n,); see :meth:`size_of`.
        owner
            A number that later finders of these keys are told.
        taken : (n,) int64
            Filled with -1: gets the slots of ``NEW`` keys in the step that takes them, so that a caller who is
            interrupted before this method returns still knows what is his.

        Raises
        ------
        ArgumentError
            A key stands twice in the batch, or has a record of another length; or a length is negative, no integer, or
            not one a key.
        PoolFullError
            Too few slots are free or may be evicted; the message has the numbers. Nothing was evicted or touched.
        """
        words = _words(keys)
        sizes = _sizes(nbytes, len(words))
        n = len(words)
        made = Reservation(np.empty(n, np.int64), np.empty(n, np.uint8), np.empty(n, np.int64))
        mine = np.empty(n, np.int64) if taken is None else _room("taken", taken, np.int64, n)
        if isinstance(owner, bool) or not isinstance(owner, (int, np.integer)) or not -_OWNERS <= owner < _OWNERS:
            raise ArgumentError(f"owner = {shown(owner)}: must be an integer of 64 bits")
        prints, rows = scratch(n)
        with self._lock:
            fault, a, b = core.reserve(self._table, words, sizes, int(owner), prints, rows, *made, mine)
            counts = self.counts() if fault == core.FULL else None
        if counts is not None:
            raise PoolFullError(
                f"{a} slots asked for: {counts.free} of {counts.capacity} are free, {b} may be evicted beside the keys of this "
                f"batch, {counts.pinned} are pinned, {counts.reserved} are reserved"
            )
        if fault == core.DUPLICATE:
            raise ArgumentError(f"keys[{a}] and keys[{b}] are the same key; a batch names each key once")
        if fault == core.LENGTH:
            raise ArgumentError(f"keys[{a}] has a record of {b} bytes, not of {sizes[a if len(sizes) > 1 else 0]}")
        return made

    def commit(self, slots: SlotsLike, *, once: Once | None = None) -> bool:
        """Make reserved slots resident: their keys are visible from now on, and may be evicted.

        Parameters
        ----------
        slots
        once
            A (1,) uint8 cell. A call sets it in the same step that changes the slots, and does nothing where it is set
            already: who was interrupted, or shares the work with other threads, may simply call again.

        Returns
        -------
        bool
            Whether this call did it.

        Raises
        ------
        IndexStateError
            A slot is not reserved, does not exist, or stands twice in the batch. Nothing was changed.
        """
        return self._settle("commit", core.commit, slots, once)

    def abort(self, slots: SlotsLike, *, once: Once | None = None) -> bool:
        """Give reserved slots back, unwritten. ``once``, result and errors as in :meth:`commit`."""
        return self._settle("abort", core.abort, slots, once)

    def acquire(
        self,
        keys: KeysLike,
        nbytes: int | npt.ArrayLike | None = None,
        *,
        taken: npt.NDArray[np.int64] | None = None,
        counts: bool = True,
    ) -> npt.NDArray[np.int64]:
        """Pin resident keys: (n,) int64 slots, -1 where a key is not resident.

        Each occurrence of a key takes one pin, to be given back by :meth:`release`. The records count as used.

        Parameters
        ----------
        keys
        nbytes
            Lengths that the records must have; None for any.
        taken : (n,) int64
            Filled with -1: to be used instead of a new array; see :meth:`reserve`.
        counts
            False for who only copies the records somewhere else: that nobody asked for them, the policy must not take for
            a use. Their place among others is that of their release even so, where the policy goes by that.

        Raises
        ------
        ArgumentError
            A record has another length; nothing was pinned.
        """
        words = _words(keys)
        sizes = np.array([core.ANY_LENGTH]) if nbytes is None else _sizes(nbytes, len(words))
        slots = np.empty(len(words), np.int64) if taken is None else _room("taken", taken, np.int64, len(words))
        prints = np.empty(len(words), np.int64)
        with self._lock:
            fault, at, there = core.acquire(self._table, words, sizes, prints, slots, bool(counts))
        if fault == core.LENGTH:
            raise ArgumentError(f"keys[{at}] has a record of {there} bytes, not of {sizes[at if len(sizes) > 1 else 0]}")
        return slots

    def release(self, slots: SlotsLike, *, once: Once | None = None) -> bool:
        """Drop one pin of each slot; -1 is skipped, so the result of :meth:`acquire` can be handed back as it is.

        ``once`` and result as in :meth:`commit`.

        Raises
        ------
        IndexStateError
            A slot has fewer pins than it is named, or does not exist. Nothing was changed.
        """
        return self._settle("release", core.release, slots, once)

    def drop(self, keys: KeysLike, *, slots: SlotsLike | None = None, once: Once | None = None) -> int:
        """Forget resident keys, and say how many there were.

        They are invisible at once. A slot is free now or, while it is pinned, from its last release on. Keys that
        are only reserved stay so.

        Parameters
        ----------
        keys
        slots : (n,) int64
            Forget a key only if its record is in this slot: for who holds the slots, while others may have dropped the keys
            and stored them anew elsewhere. None for wherever they are.
        once
            As in :meth:`commit`; where it is set already, nothing is forgotten. It is not set here.
        """
        words, batch = _words(keys), _slots(() if slots is None else slots)
        if slots is not None and len(batch) != len(words):
            raise ArgumentError(f"slots: {len(batch)} of them for {len(words)} keys")
        cell = np.zeros(1, np.uint8) if once is None else _room("once", once, np.uint8, 1)
        with self._lock:
            return int(core.drop(self._table, words, batch, cell))

    def size_of(self, slots: SlotsLike) -> npt.NDArray[np.int64]:
        """Length in bytes of the record in each slot, as given to :meth:`reserve`; (n,) int64.

        0 for -1 and for free slots. Ask while you hold the slots: others may evict what is not pinned.

        Raises
        ------
        IndexStateError
            A slot does not exist.
        """
        asked = _slots(slots)
        if asked.size and (asked.min() < -1 or asked.max() >= self.capacity):
            seen = f"{asked.min()} to {asked.max()}"
            raise IndexStateError(f"size_of: slots must be from -1 to {self.capacity - 1}; seen: {seen}")
        with self._lock:
            return np.where(asked < 0, 0, self._table.words[asked, SIZE])

    def keys_of(self, slots: SlotsLike) -> npt.NDArray[np.uint8]:
        """Keys of the records in slots, (n, 32) uint8. Ask while you hold the slots, as for :meth:`size_of`."""
        asked = _slots(slots)
        if asked.size and (asked.min() < 0 or asked.max() >= self.capacity):
            seen = f"{asked.min()} to {asked.max()}"
            raise IndexStateError(f"keys_of: slots must be from 0 to {self.capacity - 1}; seen: {seen}")
        with self._lock:
            return np.ascontiguousarray(self._table.words[asked, :SIZE]).view(np.uint8)

    def counts(self) -> IndexCounts:
        """Slots by state, all from the same moment."""
        with self._lock:
            free, reserved, pinned, evictions, absent, _ = self._table.counters.tolist()
        there = self.capacity - absent
        return IndexCounts(there, free, reserved, there - free - reserved, pinned, evictions)

    def check(self) -> None:
        """Verify every invariant, in O(capacity) and under the lock: for tests and when looking for leaks.

        Raises
        ------
        IndexStateError
            The index is damaged; the message says how and where.
        """
        with self._lock:
            problem, place = first_problem(self._table)
        if problem:
            raise IndexStateError(f"index is damaged at {place}: {PROBLEMS[problem]}")

    def _settle(self, name: str, call: Any, slots: SlotsLike, once: Once | None) -> bool:
        batch, cell = _slots(slots), np.zeros(1, np.uint8) if once is None else _room("once", once, np.uint8, 1)
        with self._lock:
            fault, place = call(self._table, batch, cell)
            if fault not in (core.OK, core.AGAIN):
                self._refuse(name, fault, place, int(batch[place]))
        return bool(fault == core.OK)

    def _refuse(self, name: str, fault: int, place: int, slot: int) -> NoReturn:
        state = _STATES[int(self._table.shorts[slot, STATE])] if fault == core.STATUS else ""
        if fault == core.RANGE:
            what = f"outside 0 to {self.capacity - 1}"
        elif fault == core.DUPLICATE:
            what = "twice in this batch"
        elif name == "release":
            what = f"{state} with {int(self._table.cells[slot, PINS])} pins, fewer than are to be released"
        else:
            what = f"{state}, not reserved"
        raise IndexStateError(f"{name}: slots[{place}] = {slot} is {what}; nothing was changed")


def _integer(name: str, value: int, most: int | None, least: int = 1) -> int:
    is_number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_number or value < least or (most is not None and value > most):
        upwards = "on" if most is None else f"to {most}"
        raise ConfigError(f"{name} = {shown(value)}: must be an integer from {least} {upwards}")
    return int(value)


def _room(name: str, array: Any, kind: type, length: int) -> Any:
    """An array of the caller's that compiled code writes to, and not behind its end."""
    fits = isinstance(array, np.ndarray) and array.dtype == kind and array.shape == (length,) and array.flags.carray
    if not fits:
        seen = f"shape {array.shape}, dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ArgumentError(f"{name} must be a contiguous, writable ({length},) {np.dtype(kind)} array; seen: {seen}")
    return array


# Each distinct array type would be compiled again, so the compiled code is only ever handed writable, aligned,
# contiguous arrays of one dtype; others are copied, which costs less than hashing them. What has that form already is taken
# as it is, before anything else: NumPy gives up the GIL for each operation on a large array, and beside a thread that
# computes in Python it is 5 ms until it comes back.


def _words(keys: KeysLike) -> npt.NDArray[np.int64]:
    words = as_keys(keys).view(np.int64)
    return words if words.flags.writeable and words.flags.aligned else words.copy()


def _slots(slots: SlotsLike) -> npt.NDArray[np.int64]:
    if type(slots) is np.ndarray and slots.dtype == np.int64 and slots.ndim == 1 and slots.flags.carray:
        return slots
    array = np.asarray(slots)
    if array.size == 0 and not isinstance(slots, np.ndarray):
        array = array.astype(np.int64)  # NumPy makes floats of an empty list
    if array.ndim != 1 or array.dtype.kind not in "iu" or not np.can_cast(array.dtype, np.int64):
        raise ArgumentError(f"slots must be 1-d integers; seen: shape {array.shape}, dtype {array.dtype}")
    return np.require(array, np.int64, ["C", "A", "W"])


def _sizes(nbytes: int | npt.ArrayLike, count: int) -> npt.NDArray[np.int64]:
    """(n,), or (1,) for all."""
    if type(nbytes) is int and 0 <= nbytes <= LARGEST:
        return np.array([nbytes], np.int64)
    array = np.asarray(nbytes)
    if array.size == 0 and not isinstance(nbytes, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or not np.can_cast(array.dtype, np.int64) or array.shape not in ((), (count,)):
        raise ArgumentError(f"nbytes must be one integer or {count}; seen: shape {array.shape}, dtype {array.dtype}")
    if array.size and array.min() < 0:
        raise ArgumentError(f"nbytes must be at least 0; seen: {array.min()}")
    return np.require(np.atleast_1d(array), np.int64, ["C", "A", "W"])


@functools.cache
def load_compiled() -> None:
    """Loads all that is compiled, or compiles it, once in a process: else each first call would, and an interrupt in the
    middle of that can abort the process inside LLVM."""
    index, once = BlockIndex(2, ready=1), np.zeros(1, np.uint8)
    index.grow(2)
    keys, sizes = np.arange(64, dtype=np.uint8).reshape(2, 32), np.zeros(2, np.int64)
    index.reserve(keys, sizes, owner=1, taken=np.full(2, -1))
    index.commit(np.array([0]), once=once)
    index.abort(np.array([1]), once=np.zeros(1, np.uint8))
    index.lookup(keys)
    index.match(keys)
    index.drop(keys)
    held = index.acquire(keys, sizes, taken=np.full(2, -1))
    index.release(held[held >= 0], once=np.zeros(1, np.uint8))
