"""Transfers under way, and what becomes of their slots when each one ends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from kvortex.digests.kept import Digests, compare, keep
from kvortex.errors import CorruptBlocksError, TransferError, shown
from kvortex.index import BlockIndex
from kvortex.keys import KeyArray
from kvortex.stats import Counters
from kvortex.transfer.executor import Direction, poll
from kvortex.transfer.plan import Int64s
from kvortex.transfer.transfer import Call, Transfer


class Flight:
    """The transfers of one engine that have not been settled. Thread-safe.

    Parameters
    ----------
    index, counters
    saved
        Told of blocks that have just become visible: keys, sizes, and which of them.
    numbers
        Of transfers; shared with others who reserve slots.

    Notes
    -----
    Nothing here runs by itself: a transfer is settled by the first call that finds it ended, be it its ticket's or the
    engine's next. Until then nobody could have noticed.

    There is no lock, so a finaliser or signal handler that runs in the middle of anything here may call anything here.
    Settling is a row of steps that each may be done again: the index gives slots back once however often it is asked.

    Parameters
    ----------
    index, counters
    digests : (slots, 16) uint8, or None
        Of the blocks in the pool: kept before a save's blocks are visible, compared before a load's are released.
    """

    def __init__(
        self,
        index: BlockIndex,
        counters: Counters,
        digests: Digests | None = None,
        saved: Callable[[KeyArray, Int64s, npt.NDArray[np.bool_]], None] | None = None,
        numbers: Iterator[int] | None = None,
    ) -> None:
        self._index, self._counters, self._digests, self._saved = index, counters, digests, saved
        self._numbers = itertools.count(1) if numbers is None else numbers
        self._transfers: dict[int, Transfer] = {}  # single operations of a dict are atomic

    def open(self, direction: Direction, count: int, call: Call) -> Transfer:
        """A transfer of ``count`` blocks that holds nothing yet; it is looked after from now on."""
        transfer = Transfer(next(self._numbers), direction, call, np.full(count, -1, np.int64))
        self._transfers[transfer.number] = transfer
        return transfer

    def find(self, number: int) -> Transfer | None:
        """The transfer of that number, None once it is settled."""
        return self._transfers.get(number)

    def settle(self, transfer: Transfer) -> bool:
        """Whether a transfer has ended; the first call that finds so makes its blocks visible or releases them."""
        if transfer.settled:
            return True
        if not self._end(transfer) or not all(self._end(save) for save, _ in transfer.after):
            return False
        for save, at in transfer.after:
            if save.direction is Direction.LOAD:  # the second part of this load
                transfer.mask[at] = save.mask
            elif save.error is not None:
                transfer.mask[at] = False
            elif save.unfit and transfer.keys is not None:
                transfer.mask[at] &= self._index.lookup(transfer.keys[at])
            if save.error is not None:
                transfer.error = transfer.error or save.error
        self._transfers.pop(transfer.number, None)  # first: once settled, nobody looks here again
        transfer.settled = True
        transfer.after = []
        return True

    def _end(self, transfer: Transfer) -> bool:
        """Whether the transfer's own bytes have moved, or never will; gives its slots back then."""
        if transfer.ended:
            return True
        if not transfer.issued():
            return False
        completion = transfer.completion  # now that its call is over, and not before: another thread may have just set it
        if completion is not None and not completion.started:
            completion.cancel()
        if completion is not None and (missing := completion.missing()) and transfer.is_deserted():
            completion.abort(TransferError(f"the ticket was dropped before layers {shown(list(missing))} were announced"))
        if completion is not None and not completion.query():
            return False
        moved = transfer.moved()
        held = fit = transfer.slots[moved]
        unfit: npt.NDArray[np.bool_] | None = None  # as without a codec, whose saves are to cost nothing more
        error = completion.error if completion is not None else None
        if completion is None and len(held):
            error = TransferError("the call was interrupted before anything moved")
        if error is not None:
            transfer.mask[moved] = False
            transfer.error = error
        elif completion is not None:
            unfit, found = completion.unfit, completion.digests
            if transfer.direction is Direction.LOAD:
                self._compare(transfer, held, found, unfit)
            else:
                if unfit is not None:
                    transfer.mask[moved[unfit]] = False
                    transfer.unfit = int(unfit.sum())
                    fit, found = held[~unfit], None if found is None else found[~unfit]
                if found is not None and self._digests is not None:
                    keep(transfer.once, fit, found, self._digests)
        if transfer.direction is Direction.LOAD:
            mine = self._index.release(held, once=transfer.once)
        elif error is not None:
            mine = self._index.abort(held, once=transfer.once)
        else:
            if unfit is not None:  # first: ``once`` says that all of it is done
                self._index.abort(held[unfit], once=transfer.once_unfit)
            mine = self._index.commit(fit, once=transfer.once)
        transfer.ended = True
        if mine and error is None and transfer.saved is not None and self._saved is not None:
            keys, sizes = transfer.saved
            there = transfer.slots >= 0
            if unfit is not None:
                there[moved[unfit]] = False
            self._saved(keys, sizes, there)
        if mine and error is not None:
            self._counters.fail(len(held))
        elif mine and completion is not None:
            count, nbytes = len(held), transfer.nbytes
            if unfit is not None and transfer.unfit:
                count, nbytes = count - transfer.unfit, int(transfer.payload[~unfit].sum())
                self._counters.overlong(transfer.unfit)
            self._counters.transfer(transfer.direction, completion.route, count, nbytes, completion.seconds)
            self._counters.damage(transfer.corrupt)
        return True

    def _compare(
        self, transfer: Transfer, held: Int64s, found: Digests | None, unfit: npt.NDArray[np.bool_] | None
    ) -> None:
        """Blocks that are not what was saved are failures of a load, and nobody will find them again. The others are right."""
        wrong = None if transfer.once[0] else unfit
        if found is not None and self._digests is not None:
            wrong = compare(transfer.once, held, found, self._digests)
            if wrong is not None and unfit is not None:
                wrong |= unfit
        if wrong is None or not wrong.any():  # without an answer, another thread has seen to it
            return
        transfer.mask[transfer.moved()[wrong]] = False
        transfer.corrupt = int(wrong.sum())
        why = "their digests differ" if unfit is None else "their digests differ, or they are no records of the codec"
        error = CorruptBlocksError(
            f"{transfer.corrupt} of {len(held)} blocks are not what was saved ({why}) and were dropped: compute "
            "them again. Host memory, the link or the GPU's memory damaged them, or somebody wrote to pages while they moved."
        )
        error.blocks = transfer.corrupt
        transfer.error = error
        there = held[wrong]  # the keys may be in other slots by now, saved anew; or others in these
        self._index.drop(self._index.keys_of(there), slots=there, once=transfer.once)

    def reap(self) -> None:
        """Settles whatever has ended."""
        for transfer in list(self._transfers.values()):
            self.settle(transfer)

    def drain(self, timeout: float) -> int:
        """Settles everything, waiting up to ``timeout`` seconds; the number of transfers that still run.

        For the end of an engine: saves that miss layers are given up, since nobody can announce them any more.
        """
        for transfer in list(self._transfers.values()):
            if transfer.completion is not None and (missing := transfer.completion.missing()):
                error = TransferError(f"the engine was shut down before layers {shown(list(missing))} were announced")
                transfer.completion.abort(error)
        poll(self._empty, time.monotonic() + timeout)
        return len(self._transfers)

    def _empty(self) -> bool:
        self.reap()
        return not self._transfers
