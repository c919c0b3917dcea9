"""A paged cache that belongs to JAX, and that kvortex reads and writes behind JAX's back.

JAX says that arrays do not change, and shows a caller no stream to order anything by. Why it is right all the same:

- *Addresses.* A layer's array is only ever given to a compiled function for good, and comes back in the same memory. XLA does
  so where it can, and is not bound to: so the address is compared after each pass, and before a layer is saved, and another
  one is refused. (The other way round, memory of kvortex or CuPy that JAX borrows by DLPack, cannot be given away: each pass
  would copy all pages.)
- *Order.* What kvortex does waits until JAX is done: ``block_until_ready`` on the array that a save reads, or on all of them.
  What JAX does waits until kvortex is done: its stream waits for a layer (:mod:`perf.jax_stream`), or the host for a layer or
  a ticket, before what reads it is launched.
- *Values.* JAX keeps a copy on the host of what was read with ``numpy.asarray(array)``. No page is read so, but by a compiled
  function that makes a new array of it.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import numpy as np

import kvortex
from examples.lm.model import Shape
from examples.lm.pages import BLOCK_SIZE
from kvortex.errors import LayoutError
from perf.jax_llama import Ids, Layers


class JaxPages:
    """Pages of all layers.

    Attributes
    ----------
    layers
        For :meth:`perf.jax_llama.JaxLlama.forward`, which replaces each by its successor.
    layout
        The same for kvortex; valid as long as :meth:`check` says nothing.
    count
        Pages.
    even
        Whether all layers lie the same distance apart, as they do where JAX had given no memory away before: kvortex can then
        copy pages by strided DMA, which takes nothing from a computing model.
    """

    def __init__(self, jax: Any, shape: Shape, count: int, device: str, dtype: str = "bfloat16") -> None:
        self._jax, self.count = jax, count
        whole = (count, 2, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
        self.layers: Layers = jax.block_until_ready([jax.numpy.zeros(whole, dtype) for _ in range(shape.layers)])
        self._addresses = [layer.unsafe_buffer_pointer() for layer in self.layers]
        self.even = len(set(np.diff(self._addresses).tolist())) <= 1
        itemsize = self.layers[0].dtype.itemsize
        strides = tuple(itemsize * int(np.prod(whole[axis + 1 :])) for axis in range(len(whole)))
        specs = [kvortex.TensorSpec(address, whole, strides, itemsize, device) for address in self._addresses]
        self.layout = kvortex.KVLayout.from_pointers(specs, order="NHD")
        self._spoil, self._differ = _compiled(jax)

    def check(self, layer: int | None = None) -> None:
        """Waits for JAX to be done with a layer, or all; LayoutError where its pages are not where they were."""
        for at in range(len(self.layers)) if layer is None else (layer,):
            self.layers[at].block_until_ready()
            address = self.layers[at].unsafe_buffer_pointer()
            if address != self._addresses[at]:
                raise LayoutError(
                    f"JAX has moved the pages of layer {at} from {self._addresses[at]:#x} to {address:#x}: its compiler did "
                    "not write them in place, and kvortex would move what is there no more"
                )

    def spoil(self, table: Ids) -> None:
        """Fills pages with NaN, so that none can pass for what it held before."""
        self.layers[:] = [self._spoil(layer, table) for layer in self.layers]
        self.check()

    def wrong_bytes(self, mine: Ids, theirs: Ids) -> int:
        """Bytes of pages ``mine`` that are not those of pages ``theirs``."""
        return sum(int(self._differ(layer, mine, theirs)) for layer in self.layers)


@functools.cache  # and so is what they compile to
def _compiled(jax: Any) -> tuple[Any, Any]:
    return jax.jit(partial(_spoil, jax), donate_argnums=0), jax.jit(partial(_differ, jax))


def _spoil(jax: Any, layer: Any, table: Any) -> Any:
    return layer.at[table].set(jax.numpy.asarray(jax.numpy.nan, layer.dtype))


def _differ(jax: Any, layer: Any, mine: Any, theirs: Any) -> Any:
    a, b = (jax.lax.bitcast_convert_type(layer[table], "uint8") for table in (mine, theirs))
    return (a != b).sum()  # int32: a layer of 64 K tokens has 256 MiB
