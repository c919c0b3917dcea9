"""A short load by copy engines, digested by a kernel that is launched while its DMAs move.

A kernel behind a DMA ends some 8 us after that, a fifth of the time in which 2 MiB cross the link. One that is there before,
and waits for a flag that the copies' stream raises (:mod:`kvortex.kernels.reading`), goes on when it sees that. It keeps
multiprocessors meanwhile, so it is for short loads, whose caller has no work on its stream, and for half of the GPU at most.

It must not keep them from what its copies wait for: kernels that are ahead of these on their stream, or a model's that those
wait for. So it begins when the copies are next on their stream: behind the event that is recorded right before them. The
copies, and the flag, are issued before the kernel: a driver that returns from a launch only when the kernel has ended returns.
All copies of such loads are on one stream, so that the flag, which only grows, is raised in the order in which they end. That
stream, and the kernels', are theirs alone: what is on others may wait for its callers.
"""

from __future__ import annotations

from kvortex.devices.driver import EVENT_RECORD, STREAM_WAIT, STREAM_WRITE_VALUE
from kvortex.devices.native import call
from kvortex.jit import njit
from kvortex.transfer.digesting import FLAG, VALUE, read
from kvortex.transfer.issue.cells import RAISED
from kvortex.transfer.issue.dma import copy_chunk, fill_rectangle
from kvortex.transfer.issue.framing import begin, end
from kvortex.transfer.issue.ordering import follow
from kvortex.transfer.plan import DEVICE_SIDE

_WORD = 0xFFFFFFFF


@njit(nogil=True)
def issue_early(  # type: ignore[no-untyped-def]
    functions, lane, streams, caller, after, start, done, chunks, copies, digest, parameters, pointers, scratch, outcome
):
    """Puts a load of one chunk, copies alone, on the first of two streams, and the kernel that reads on the second.

    ``done`` is on the second, or on the first where no kernel was launched. The parameters are those of
    :func:`kvortex.transfer.issue.plans.issue`.
    """
    behind = streams[0]
    entered, error = begin(functions, lane, caller, outcome)
    if not entered:
        return
    if not error:
        error = follow(functions, behind, after)
    fill_rectangle(False, copies[0], copies[0, DEVICE_SIDE], scratch)  # what the first copy needs is in the caches then
    if not error:
        error = call(functions[EVENT_RECORD], (start, behind))
    if not error:
        error = copy_chunk(False, functions, copies, chunks[0], 0, behind, scratch)
    if not error:
        lane[RAISED] = (lane[RAISED] + 1) & _WORD  # also when this fails: no two loads have the same value
        digest[VALUE] = lane[RAISED]
        error = call(functions[STREAM_WRITE_VALUE], (behind, digest[FLAG], digest[VALUE], 0))
    if not error:
        error = call(functions[STREAM_WAIT], (streams[1], start, 0))
    if not error:
        error = read(functions, digest, streams[1], parameters, pointers)
        if not error:
            behind = streams[1]  # it ends after the copies
    end(functions, done, behind, error, 0, scratch, outcome)
