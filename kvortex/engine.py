"""The engine: the one room that knows all the parts, and puts them together."""

from __future__ import annotations

import functools
import os
import threading
import time
import warnings
import weakref
from types import TracebackType
from typing import Any

import numpy as np

from kvortex import arguments
from kvortex.calls import EngineCall
from kvortex.coding import Coding, Rows
from kvortex.config import KVortexConfig
from kvortex.devices import Device
from kvortex.errors import (
    ArgumentError,
    CodecWarning,
    ConfigError,
    EngineClosedError,
    PoolFullError,
    PoolTimeoutError,
    ReentrantCallError,
    TransferTimeoutError,
)
from kvortex.index import DECLINED, PENDING, Reservation
from kvortex.issuing import Memory, memory_of, rest_of, start
from kvortex.keys import KeyArray, KeyScheme, KeySequence, KeysLike, as_keys, make_scheme
from kvortex.layout import KVLayout
from kvortex.opening import check_given, codec_for, codings_for, namespace_of, open_for, record_format, warnings_of
from kvortex.parts import Parts
from kvortex.stats import EngineStats
from kvortex.tiers.promotion import Prefetch, Promotion
from kvortex.tiers.urls import open_tiers
from kvortex.traces.recording import CHECK, LOAD, SAVE, Recording
from kvortex.traces.recordings import Recordings
from kvortex.transfer.executor import Direction, poll
from kvortex.transfer.plan import Int64s
from kvortex.transfer.ticket import Ticket
from kvortex.transfer.transfer import Mask, Transfer

_NO_LAYERS = "layerwise: opaque buffers have no layers that kvortex knows of"


class KVortexEngine:
    """A pool of pinned host memory that KV blocks are saved to and loaded from. Made by :meth:`create`.

    Threads: every method may be called from any thread. Transfers run after the work that was on the caller's stream
    when the call was made, and beside everything else; two transfers that must not overlap (a load into a page that a
    save still reads) are for the caller to order, by :meth:`Ticket.wait` or :meth:`Ticket.add_to`.

    Attributes
    ----------
    config, layout, device
    codec
        The :class:`kvortex.codecs.Codec` of the pool, and of tiers that have none of their own; None for records as they lie in
        pages.
    namespace
        What the pool's blocks are of, besides their tokens.
    scheme
        How :meth:`block_keys` names them: a :class:`kvortex.keys.KeyScheme`.
    """

    def __init__(
        self, config: KVortexConfig, layout: KVLayout | None, device: Device, parts: Parts, scheme: KeyScheme, coding: Coding
    ) -> None:
        self._finalizer = weakref.finalize(self, Parts.abandon, parts, config.transfer_timeout_s)
        self.config, self.layout, self.device = config, layout, device
        self.namespace, self.scheme = scheme.namespace, scheme
        self._parts = parts
        self._index, self._executor, self._flight, self._counters = parts.index, parts.executor, parts.flight, parts.counters
        self._cascade, self._coding, self.codec = parts.cascade, coding, coding.codec
        self._calls: dict[int, weakref.ref[EngineCall]] = {}
        self._recordings = Recordings(config.block_size)
        self._closed = False

    @classmethod
    def create(cls, config: KVortexConfig | None = None, layout: KVLayout | None = None) -> KVortexEngine:
        """Takes the memory and starts an engine.

        Parameters
        ----------
        config
            None for ``KVortexConfig.from_env()``.
        layout
            Where the pages are. Without one the engine moves opaque buffers only, of up to ``config.max_block_bytes``.

        Raises
        ------
        ConfigError
            A budget is too small, there is neither a layout nor ``max_block_bytes``, ``transfer_route`` cannot run on this
            GPU, ``codec`` or that of a tier cannot code these pages, ``key_scheme`` needs another ``key_seed`` or ``lora``,
            ``record_trace`` cannot be written, one of ``tiers`` cannot be opened, or ``config`` is none.
        LayoutError
            The layout's tensors are on another device, or ``layout`` is none.
        DeviceUnavailableError, DeviceError, BuildError, PinnedMemoryError
            The device, its kernels or the memory cannot be had. Nothing stays taken.
        """
        config = KVortexConfig.from_env() if config is None else config
        check_given(config, layout)
        device = open_for(config, layout)
        record_bytes = max(layout.record_bytes if layout is not None else 0, config.max_block_bytes or 0)
        if not record_bytes:
            raise ConfigError("max_block_bytes = None: an engine without a layout needs the size of its largest buffer")
        codec = codec_for(config, layout, device)
        record_bytes = record_bytes if codec is None else codec.slot_bytes
        codings = codings_for(config, layout, codec)
        namespace = namespace_of(config, layout, codec, codings)
        scheme = make_scheme(config.key_scheme, namespace, seed=config.key_seed)
        for text in warnings_of(codings):
            warnings.warn(text, CodecWarning, stacklevel=2)
        own = sorted((each.own for each in codings if each is not None and each.own is not None), key=lambda each: each.exact)
        tiers = open_tiers(config.tiers, record_format(namespace, record_bytes, codec), codings)
        try:
            parts = Parts(config, layout, device, record_bytes, tiers, codec)
        except BaseException:
            for opened in tiers:
                opened.tier.close()
            raise
        try:
            engine = cls(config, layout, device, parts, scheme, Coding(codec, namespace, own[0] if own else None))
            engine._recordings.open_as_told(config.record_trace)
            return engine
        except BaseException:
            parts.dispose(0.0)
            raise

    # -- keys and look-ups

    def block_keys(
        self,
        token_ids: Any,
        parent: bytes | KeyArray | None = None,
        *,
        lora: str | None = None,
        salt: str | None = None,
        **about: Any,
    ) -> KeyArray:
        """Keys of the full blocks of a token sequence, by the config's ``key_scheme``.

        Parameters
        ----------
        token_ids
            (t,) integers, from 0 to 2**32 - 1 by the scheme ``kvortex`` and to 2**63 - 1 by vLLM's; a last block that is not
            full gets no key.
        parent
            Key of the block before the first, to extend a sequence without hashing it again.
        lora, salt
            Instead of the config's, for this sequence. By the scheme ``vllm`` a LoRA is ``"name=path"``.
        **about
            ``multimodal``, ``prompt_embeds`` and ``start`` of a vLLM request: see :meth:`kvortex.keys.VllmKeys.chain` and
            :meth:`kvortex.keys.KeyScheme.block_keys`.

        Returns
        -------
        (t // block_size, 32) uint8
            By vLLM's schemes vLLM's own hashes. They say nothing of model, layout or rank: the engine adds these
            to every key that it is given (:func:`kvortex.keys.adopt`), so blocks of others are never mixed up here either.

        Raises
        ------
        ArgumentError
            Tokens, ``parent`` or what else was given; the message names it.
        """
        return self.scheme.block_keys(token_ids, parent, lora=lora, salt=salt, **about)

    def key_sequence(self, *, lora: str | None = None, salt: str | None = None, **about: Any) -> KeySequence:
        """The keys of one sequence that grows: tokens are handed in as they come, and each is hashed once.

        Arguments as for :meth:`block_keys`.
        """
        return self.scheme.sequence(lora=lora, salt=salt, **about)

    def check_blocks(self, keys: KeysLike, *, first: Any = None, tiers: bool = True, timeout: float = 0.0) -> Mask:
        """Which blocks are in the cache now, (n,) bool. Pins nothing: a later load may still miss.

        True says that a block is in RAM, or that a tier below had it when it was last seen there, at most ``fresh_s`` ago
        (:class:`kvortex.tiers.TierOptions`): it was written, read or asked for then. A disk is asked at once; of stores that
        machines share, nobody is asked for an answer. False says that it is in none of these, as far as is known; what
        is not known is asked for in the background, in one question for all, so that a later call knows.

        Parameters
        ----------
        keys
        first
            As for :meth:`save_blocks`.
        tiers
            False for RAM alone.
        timeout
            Seconds that the call may wait for answers of tiers about which nothing is known.
        """
        stored, allowed = self._stored(keys), arguments.seconds(timeout)
        rows = self._coding.rows(stored, first)
        with EngineCall(self):
            found = self._index.lookup(rows.keys)
            if tiers and self._cascade is not None and self._cascade.is_awake() and not found.all():
                found[~found] = self._cascade.check(rows.keys[~found], allowed)
            found = rows.whole(found)
            self._counters.check(len(found), int(found.sum()))
            self._recordings.note(CHECK, stored)
            return found

    # -- transfers

    def save_blocks(
        self,
        keys: KeysLike,
        block_ids: Any = None,
        sizes: Any = None,
        *,
        data_ptrs: Any = None,
        stream: Any = None,
        layerwise: bool = False,
        first: Any = None,
    ) -> Ticket:
        """Starts saving blocks, and returns at once. A block that is in the cache already is not moved, nor is one that has not
        been offered as often as ``config.admit_after`` says, or that is just being fetched from a tier below; that is no error,
        and the mask tells.

        ``save_blocks(keys, block_ids)`` saves pages of the layout; ``save_blocks(keys, data_ptrs, sizes)`` saves opaque
        contiguous buffers of the device.

        Parameters
        ----------
        keys
            n different keys, (n, 32) uint8 or a sequence of 32-byte strings.
        block_ids : (n,) integers
            Different pages.
        data_ptrs, sizes : (n,) integers
            Addresses and lengths in bytes. What an earlier block left in a slot behind a shorter buffer stays there, as the
            bytes of evicted blocks do; loads give no more than was saved.
        stream
            Stream that writes the pages: the save waits for what is on it now. An int handle or a stream object of
            cuda.core, CuPy, Numba or torch; None for the legacy default stream. The caller must not overwrite the pages
            before the ticket is done, or must make the writing stream wait (:meth:`Ticket.add_to`).
        layerwise
            The pages are still to be computed: reserves slots, moves nothing, and saves each layer behind
            :meth:`Ticket.save_layer`, whose default ``stream`` becomes. The blocks are visible when all layers are saved;
            who drops the ticket before all are announced gives the save up. Not for opaque buffers.
        first
            Which blocks begin a sequence: True where ``keys[0]`` does, False where none does, or (n,) bools. A codec with loss
            must be told, in every call, since it keeps these blocks exactly and under keys of their own, be it the pool's or
            a tier's. Others do not ask.

        Returns
        -------
        Ticket
            Its mask says which blocks are in the cache. They are visible once the ticket is done. See :attr:`Ticket.mask`.

        Raises
        ------
        ArgumentError
            Lengths, ranges or duplicates, or a key whose block has another size; nothing was done.
        PoolFullError
            Too many slots are pinned or being written; nothing was done. Wait for a ticket, or enlarge the pool. While the
            pool still grows the call waits for more of it instead, and up to 0.2 s for slots that tiers below have just now.
            A tier that hangs keeps at most ``config.tier_pool_share`` of the pool, twice: what it writes, and what it reads.
        """
        asked = self._stored(keys)
        rows = self._coding.rows(asked, first)
        rows.check_different(asked)
        keys, memory = rows.keys, self._memory(rows, len(asked), block_ids, data_ptrs, sizes, Direction.SAVE)
        if layerwise and not memory.paged:
            raise ArgumentError(_NO_LAYERS)
        with EngineCall(self) as call:
            self._executor.check_stream(stream)
            transfer = self._flight.open(Direction.SAVE, len(keys), call)
            transfer.layers = self.layout.num_layers if layerwise and self.layout is not None else 0
            found = self._reserve(keys, memory.lengths, transfer)
            declined, pending = found.status == DECLINED, found.status == PENDING
            transfer.mask[declined] = False
            self._counters.decline(int(np.count_nonzero(declined)))
            for owner in sorted(set(found.owners[pending].tolist())):
                at = np.flatnonzero(pending & (found.owners == owner))
                save = self._flight.find(owner)
                if save is None:  # it ended since reserve looked
                    transfer.mask[at] = self._index.lookup(keys[at])
                else:
                    transfer.after.append((save, at))
            if self._cascade is not None:
                transfer.saved = keys, memory.lengths
            transfer.keys = keys if self.codec is not None else None
            start(self._executor, transfer, memory, stream, bool(layerwise))
            self._recordings.note(SAVE, asked)
            return self._ticket(transfer, rows, stream if layerwise else None)

    def load_blocks(
        self,
        keys: KeysLike,
        block_ids: Any = None,
        sizes: Any = None,
        *,
        output_ptrs: Any = None,
        stream: Any = None,
        layerwise: bool = False,
        fetch: bool = True,
        first: Any = None,
    ) -> Ticket:
        """Starts loading blocks, and returns at once. A block that is not in the cache is a miss, told by the mask.

        What is in RAM moves now. What a tier below has, or may have, is brought into RAM first, in the background, and then
        moves as a second part of the same ticket, which is done when both are. What has not come by the tiers' deadlines is
        a miss. :meth:`prefetch` brings blocks into RAM ahead of need.

        ``load_blocks(keys, block_ids)`` loads into pages of the layout; ``load_blocks(keys, output_ptrs, sizes)`` into
        opaque contiguous buffers, whose sizes must be those that were saved.

        Parameters
        ----------
        keys
            n keys.
        block_ids : (n,) integers
            Different pages. Those of misses stay as they are, but for first blocks of sequences of which a codec with loss
            has only a part left.
        output_ptrs, sizes : (n,) integers
            Addresses and lengths in bytes of buffers that do not overlap.
        stream
            Stream that may still read or write the pages: the load waits for what is on it now. As in
            :meth:`save_blocks`. A reader must wait for the ticket, or its stream must (:meth:`Ticket.add_to`).
        layerwise
            The first layers of all blocks first, so that a model can start on them: :meth:`Ticket.wait_layer`. A little
            slower as a whole, the more so the fewer blocks are neighbours in the pool. Not for opaque buffers.
        fetch
            False for what is in RAM alone. Otherwise :meth:`Ticket.add_to` and :meth:`Ticket.wait_layer` wait on the host
            until the second part is on its way, since no stream can wait for what is not.
        first
            As for :meth:`save_blocks`.

        Raises
        ------
        ArgumentError
            Lengths, ranges, duplicates, or a size that is not the saved one; nothing was done.
        """
        asked = self._stored(keys)
        rows = self._coding.rows(asked, first)
        keys, memory = rows.keys, self._memory(rows, len(asked), block_ids, output_ptrs, sizes, Direction.LOAD)
        if layerwise and not memory.paged:
            raise ArgumentError(_NO_LAYERS)
        with EngineCall(self) as call:
            self._executor.check_stream(stream)
            transfer = self._flight.open(Direction.LOAD, len(keys), call)
            transfer.layers = self.layout.num_layers if memory.paged and self.layout is not None else 0
            self._index.acquire(keys, memory.lengths, taken=transfer.slots)
            transfer.mask = transfer.slots >= 0
            longest = self.config.transfer_timeout_s
            rest = rest_of(self._parts, transfer, keys, memory, stream, bool(layerwise), longest) if fetch else None
            self._counters.miss(len(keys) - int(np.count_nonzero(transfer.mask)) - (0 if rest is None else len(rest.keys)))
            start(self._executor, transfer, memory, stream, bool(layerwise))
            if rest is not None and self._cascade is not None:
                self._cascade.submit(rest)
            self._recordings.note(LOAD, asked)
            return self._ticket(transfer, rows)

    def prefetch(self, keys: KeysLike, sizes: Any = None, *, timeout: float | None = None, first: Any = None) -> Prefetch:
        """Starts bringing blocks from tiers below into RAM, and returns at once. What two calls ask for is fetched once.

        Parameters
        ----------
        keys
            n keys. More than the pool holds evict each other.
        sizes : (n,) integers
            Bytes of each block, for opaque buffers; None for pages of the layout.
        timeout
            Seconds after which it ends with what is there; None for the tiers' own deadlines, at most
            ``transfer_timeout_s``.
        first
            As for :meth:`save_blocks`.

        Returns
        -------
        Prefetch
            Tells which blocks are in RAM. Without tiers it is done at once.

        Raises
        ------
        ArgumentError
            Sizes are missing, or do not fit.
        """
        rows = self._coding.rows(self._stored(keys), first)
        keys = rows.keys
        if sizes is None and self.layout is None:
            raise ArgumentError("this engine has no layout: pass sizes")
        if sizes is not None and self._coding.name:
            raise ArgumentError(f"sizes: there are no opaque buffers with codec {self._coding.name}; leave them out")
        page = 0 if self.layout is None else self._coding.record_bytes(self.layout.record_bytes)
        longest = self.config.transfer_timeout_s if timeout is None else arguments.seconds(timeout)
        nbytes = np.full(len(keys), page) if sizes is None else arguments.integers(sizes, "sizes", len(keys))
        with EngineCall(self):
            deadline = time.monotonic() if self._cascade is None else self._cascade.deadline(longest)
            promotion = Promotion(keys, nbytes, deadline)
            if self._cascade is not None and len(keys):
                self._cascade.submit(promotion)
            else:
                promotion.finish(self._index.lookup(keys))
                promotion.over = True
            return Prefetch(promotion, self._index.lookup, rows.whole)

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until every block whose save has ended is written to the tiers below, or given up there; wait for tickets
        first. :meth:`shutdown` does it too.

        Returns
        -------
        bool
            False where that was not so after ``timeout`` seconds (None: ``transfer_timeout_s``). Writing goes on.
        """
        seconds = self.config.transfer_timeout_s if timeout is None else arguments.seconds(timeout)
        with EngineCall(self):
            return self._cascade is None or self._cascade.flush(time.monotonic() + seconds)

    def drop_blocks(self, keys: KeysLike) -> int:
        """Forgets blocks of the pool, and says how many there were. They are misses at once; a slot that a transfer still
        uses is free when that has ended. Blocks that are being saved stay. Tiers below forget them in the background, as far
        as they can be reached."""
        stored = self._stored(keys)
        others, (firsts, parts) = self._coding.followers(stored), self._coding.others(stored)
        with EngineCall(self):
            dropped = self._index.drop(others)
            if self._cascade is not None:
                self._cascade.forget(others)
            if len(firsts):
                dropped += self._index.drop(firsts)
                self._index.drop(parts)
                if self._cascade is not None:
                    self._cascade.forget(np.concatenate((firsts, parts)))
            return dropped

    def _stored(self, keys: KeysLike) -> KeyArray:
        """The keys under which the pool holds blocks of these keys."""
        return self.scheme.stored(as_keys(keys))

    def _reserve(self, keys: KeyArray, lengths: Int64s, transfer: Transfer) -> Reservation:
        began = time.monotonic()
        while True:
            try:
                return self._index.reserve(keys, lengths, owner=transfer.number, taken=transfer.slots)
            except PoolFullError:
                if self._parts.wait_for_more(self.config.transfer_timeout_s):
                    continue
                if self._cascade is None or not self._cascade.give_way(began):
                    raise

    def _memory(self, rows: Rows, count: int, block_ids: Any, pointers: Any, sizes: Any, direction: Direction) -> Memory:
        named = memory_of(self.layout, self._parts.record_bytes, count, block_ids, pointers, sizes, direction)
        return self._coding.memory(named, rows)

    def _ticket(self, transfer: Transfer, rows: Rows, stream: Any = None) -> Ticket:
        feed, check = functools.partial(EngineCall, self, reap=False), self._executor.check_stream
        return Ticket(transfer, self._settle, self.config.transfer_timeout_s, check, feed, stream, rows.whole)

    def _settle(self, transfer: Transfer) -> bool:
        """For tickets, which hold the engine by this method and so keep it alive."""
        if not transfer.settled and self._parts.pid != os.getpid():
            raise EngineClosedError("this engine belongs to the process that this one was forked from")
        return self._flight.settle(transfer)

    # -- traces

    def record(self, path: str | os.PathLike[str]) -> Recording:
        """Records which blocks are asked for from now on, as a trace that ``kvortex replay`` plays; see :class:`Recording`.

        Use it as a context, or close it; :meth:`shutdown` closes it too. An engine may have several. What it costs a call is
        a copy of the call's keys.

        Parameters
        ----------
        path
            A file that is not there yet.

        Raises
        ------
        ArgumentError
            It is there, or cannot be written.
        """
        with EngineCall(self, reap=False):
            return self._recordings.open(path)

    # -- numbers, and the end

    def wait_ready(self, timeout: float | None = None) -> int:
        """Waits until the pool is whole, and returns its blocks.

        An engine works as soon as it is made, with the first part of its pool; the rest of a large one follows within a
        second or so. A call that finds this part full evicts, as later. Only measurements need to wait.

        Raises
        ------
        PoolTimeoutError
            It is not whole after ``timeout`` seconds (None: ``transfer_timeout_s``).
        """
        seconds = self.config.transfer_timeout_s if timeout is None else arguments.seconds(timeout)
        with EngineCall(self):
            arena = self._parts.arena
            if not arena.wait(arena.slots, seconds):
                raise PoolTimeoutError(f"{arena.ready} of {arena.slots} slots are ready after {seconds} seconds")
            self._parts.grow()
            return self._index.ready

    @property
    def notes(self) -> tuple[str, ...]:
        """What was wished for and this platform could not give: huge pages, the NUMA node, registering memory with the
        driver. Each costs speed and nothing else. Empty where all went well."""
        return (*self._parts.arena.notes, *(self._cascade.notes if self._cascade is not None else ()))

    def get_stats(self) -> EngineStats:
        """Counters since the start; see :class:`EngineStats`."""
        with EngineCall(self):
            counts = self._index.counts()
            tiers = () if self._cascade is None else self._cascade.stats()
            return self._counters.snapshot(
                counts.evictions, counts.resident, counts.reserved, counts.pinned, counts.capacity, tiers
            )

    def shutdown(self, timeout: float | None = None) -> None:
        """Waits for running calls and transfers, then frees everything. Later calls raise; a second shutdown does nothing.

        Blocks that wait for tiers are written first, for most of ``timeout``; what is left then is not stored there. A tier
        that hangs does not hold this up beyond ``timeout``: the pool's memory is kept then, since the tier may still be
        reading it.

        Raises
        ------
        TransferTimeoutError
            Calls, transfers or calls of tiers still run after ``timeout`` seconds (None: ``transfer_timeout_s``). Their memory
            stays; call again.
        ReentrantCallError
            This thread is in the middle of a call of this engine, which would wait for itself.
        """
        deadline = time.monotonic() + (self.config.transfer_timeout_s if timeout is None else arguments.seconds(timeout))
        if self._parts.pid != os.getpid():  # a forked child owns none of this
            self._closed = True
            self._finalizer.detach()
            return
        if any(call.thread == threading.get_ident() for call in self._running()):
            raise ReentrantCallError("shutdown was called from inside a call of this engine; call it when that has returned")
        self._closed = True
        if not poll(lambda: not self._running(), deadline):
            raise TransferTimeoutError(f"{len(self._running())} calls of other threads are still running")
        left = self._parts.end(max(0.0, deadline - time.monotonic()))
        if left:
            raise TransferTimeoutError(f"{left}; their memory cannot be freed yet")
        self._finalizer()
        self._parts.arena.notes.extend(self._recordings.close(deadline))

    def _running(self) -> list[EngineCall]:
        """Calls that have not ended. One that was lost to an interrupt disappears with its frame."""
        return [call for ref in list(self._calls.values()) if (call := ref()) is not None and not call.over]

    def __enter__(self) -> KVortexEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._index.capacity} blocks of {self._parts.record_bytes} bytes"
        return f"<KVortexEngine on {self.device.name}: {state}>"

