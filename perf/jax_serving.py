"""Requests to a model in JAX: computed whole, saved while it is computed, or behind what kvortex has of it.

The seconds of a request begin with its tokens in a NumPy array and end with the first new token as a Python integer: names of
blocks, look-ups, transfers that have to end before, launches and waits are all in them.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import kvortex
from examples.lm.pages import BLOCK_SIZE
from kvortex.devices import Device
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from perf.clock import CudaClock
from perf.jax_llama import Ids, JaxLlama
from perf.jax_pages import JaxPages
from perf.jax_stream import stream_of

_ROOM_BYTES = 4096  # pinned, for one number
AHEAD = 2  # layers that JAX has been given when the host waits for one: then it is never without


class Answer(NamedTuple):
    """First token's seconds; scores; and seconds until a save had ended too."""

    seconds: float
    logits: npt.NDArray[np.float32]
    saved_seconds: float = 0.0


class Waits:
    """Makes JAX, or the host, wait for a layer of a load.

    Where JAX tells the stream that it computes on (:mod:`perf.jax_stream`), that waits, and the host goes on to launch the
    next layers. Otherwise the host waits, by a stream that has nothing else to do. On the host device ``wait_layer`` itself
    waits.

    Attributes
    ----------
    stream
        For ``load_blocks`` and ``save_blocks``: nothing is ever on it, since JAX is done before they are called.
    by
        Who waits: ``"stream"`` or ``"host"``, and why not the stream.
    """

    def __init__(self, device: Device, jax: Any = None) -> None:
        self._device, self._context = device, device.context if isinstance(device, CudaDevice) else None
        self._clock = CudaClock(device) if isinstance(device, CudaDevice) else None
        self.stream = None if self._clock is None else self._clock.stream
        self._reader, self.by = None, "host"
        if self._clock is not None and jax is not None:
            try:
                self._reader, self.by = stream_of(jax), "stream"
            except kvortex.DeviceError as error:
                self.by = f"host: {error}"
        self._room: int | None = None
        if self._reader is not None:
            self._room, self._turn = device.allocate_pinned(_ROOM_BYTES), 0
            self._add = jax.jit(lambda number, turn: number + turn)
            with cu.current(self._context) as driver:
                no_timing = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
                self._event = cu.check(driver.cuEventCreate(no_timing), "cuEventCreate")

    def layer(self, ticket: kvortex.Ticket, layer: int) -> None:
        """When it returns, what is given to JAX from now on finds this layer in the pages."""
        ticket.wait_layer(layer, self._reader or self.stream)
        if self._clock is not None and self._reader is None:
            with cu.current(self._context) as driver:
                cu.check(driver.cuStreamSynchronize(self.stream), "cuStreamSynchronize")

    def number(self, array: Any) -> Callable[[], int]:
        """What waits for an int32 that JAX computes, and gives it. :func:`same` is to be asked afterwards.

        On a stream that is known by a copy behind the computation: JAX's own way to a Python integer takes half a millisecond
        from the computation's end on.
        """
        if self._reader is None or self._room is None:
            array.copy_to_host_async()
            return lambda: int(array)
        # A number of each call is added: what an earlier one left in the same memory is never taken for this one's.
        self._turn += 1
        room, event, turn = self._room, self._event, self._turn
        array = self._add(array, np.int32(turn))
        with cu.current(self._context) as driver:
            cu.check(driver.cuMemcpyDtoHAsync(room, array.unsafe_buffer_pointer(), 4, self._reader), "cuMemcpyDtoHAsync")
            cu.check(driver.cuEventRecord(event, self._reader), "cuEventRecord")

        def wait(held: Any = array) -> int:  # until then the memory is not another array's
            with cu.current(self._context) as driver:
                cu.check(driver.cuEventSynchronize(event), "cuEventSynchronize")
            return ctypes.c_int32.from_address(room).value - turn

        return wait

    def close(self) -> None:
        """Frees the stream, and what numbers are read into. JAX must be done."""
        if self._clock is not None:
            self._clock.close()
        if self._room is not None:
            self._device.free_pinned(self._room)
            with cu.current(self._context) as driver:
                driver.cuEventDestroy(self._event)
            self._room = None


def same(number: int, array: Any) -> None:
    """TransferError where a number was read before JAX had computed it, or from elsewhere."""
    if number != int(array):
        raise kvortex.TransferError(f"JAX computed {int(array)}, and its stream had {number}: it launches late, or elsewhere")


def cold(model: JaxLlama, pages: JaxPages, waits: Waits, tokens: Ids, table: Ids) -> Answer:
    """Computes a prompt whole, or its last tokens behind pages that hold the others."""
    began = time.perf_counter()
    logits, token = model.forward(tokens, table, pages.layers)
    number = waits.number(token)()
    seconds = time.perf_counter() - began
    same(number, token)
    pages.check()
    return Answer(seconds, np.asarray(logits))


def saving(
    model: JaxLlama, pages: JaxPages, engine: kvortex.KVortexEngine, waits: Waits, tokens: Ids, table: Ids
) -> Answer:
    """Computes a prompt whole, and saves each layer as soon as JAX is done with it."""
    began, layers = time.perf_counter(), model.shape.layers
    saves: list[kvortex.Ticket] = []

    def launched(layer: int) -> None:
        if not saves:  # names and slots are found while JAX computes the first layer
            keys = engine.block_keys(tokens)
            saves.append(engine.save_blocks(keys, table, stream=waits.stream, layerwise=True, first=True))
        if layer >= AHEAD:
            announce(layer - AHEAD)

    def announce(layer: int) -> None:
        pages.check(layer)  # waits for it
        saves[0].save_layer(layer)

    try:
        logits, token = model.forward(tokens, table, pages.layers, after=launched)
        wait = waits.number(token)
        for layer in range(max(0, layers - AHEAD), layers):
            announce(layer)
        number = wait()
        seconds = time.perf_counter() - began
    except BaseException:
        for save in saves:
            save.abort()
        raise
    same(number, token)
    whole(saves[0], len(table), moves=True)
    return Answer(seconds, np.asarray(logits), time.perf_counter() - began)


def hit(
    model: JaxLlama,
    pages: JaxPages,
    engine: kvortex.KVortexEngine,
    waits: Waits,
    tokens: Ids,
    table: Ids,
    *,
    layerwise: bool = True,
) -> Answer:
    """Loads all of a prompt but its last block, and computes that one: layer by layer behind the load, or when it has ended."""
    began = time.perf_counter()
    keys = engine.block_keys(tokens)[:-1]  # the last token is computed in any case: what follows it is asked for
    load = engine.load_blocks(keys, table[:-1], stream=waits.stream, layerwise=layerwise, first=True)
    if not load.found.all() and not engine.check_blocks(keys, first=True).all():  # in RAM, or a tier below may have them
        raise kvortex.TransferError("blocks that were saved are not there")
    if not layerwise:
        whole(load, len(keys), moves=True)
    before: Callable[[int], object] = (lambda layer: waits.layer(load, layer)) if layerwise else (lambda layer: None)
    logits, token = model.forward(tokens[-BLOCK_SIZE:], table, pages.layers, before=before)
    wait = waits.number(token)
    whole(load, len(keys), moves=True)  # what the token comes from was right; JAX computes the last layer and scores meanwhile
    number = wait()
    seconds = time.perf_counter() - began
    same(number, token)
    pages.check()
    return Answer(seconds, np.asarray(logits))


def whole(ticket: kvortex.Ticket, blocks: int, *, moves: bool) -> None:
    """Waits for a ticket; TransferError where a block did not come, or nothing moved that should have."""
    if int(ticket.wait().sum()) != blocks or (moves and not ticket.nbytes):
        raise kvortex.TransferError(f"a {ticket.kind} of {blocks} blocks failed, or moved nothing: {ticket.error}")


class Other:
    """Prefills of another prompt, one after another without a pause, by a thread of their own; use it as a context.

    Launched layer by layer, ``AHEAD`` of what is done, as by an engine that goes from one request to the next: whoever comes
    with a request waits for no more than that.
    """

    def __init__(self, model: JaxLlama, pages: JaxPages, tokens: Ids, table: Ids) -> None:
        self._model, self._pages, self._tokens, self._table = model, pages, tokens, table
        self._stop, self.layers = threading.Event(), 0  # layers: launched so far
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="other-prefill", daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._model.forward(self._tokens, self._table, self._pages.layers, after=self._after)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error

    def _after(self, layer: int) -> None:
        self._pages.layers[layer - AHEAD].block_until_ready()  # the last ones of the pass before, at a pass's beginning
        self.layers += 1
        if self._stop.is_set():
            raise _Stopped

    def __enter__(self) -> Other:
        self._thread.start()
        while self.layers < 2 * AHEAD and self._thread.is_alive():
            time.sleep(1e-3)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error


class _Stopped(Exception):
    pass
