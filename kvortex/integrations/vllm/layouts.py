"""vLLM's KV tensors as layouts. Of a tensor only what its methods say is used: address, shape, strides, width, device."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kvortex.errors import LayoutError, shown
from kvortex.layout import KVLayout
from kvortex.layout.tensors import TensorSpec

_SENTINEL = 1234  # blocks, in a shape that is asked for to see where they are counted


def spec_of(tensor: Any) -> TensorSpec:
    """Where a torch tensor's elements are."""
    width, device = tensor.element_size(), tensor.device
    where = "host" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
    strides = tuple(stride * width for stride in tensor.stride())
    return TensorSpec(tensor.data_ptr(), tuple(tensor.shape), strides, width, where, tensor)


def block_axis(backend: Any, dimensions: int) -> int:
    """The axis that counts blocks in the tensors of an attention backend: where its own shape has them, up to vLLM 0.28, and
    the first since then."""
    shape_of = getattr(backend, "get_kv_cache_shape", None)
    if shape_of is None:
        return 0
    shape = tuple(shape_of(_SENTINEL, 16, 8, 64))
    axis = shape.index(_SENTINEL)
    if dimensions == len(shape):
        return axis
    if dimensions != len(shape) + 1:
        raise LayoutError(f"{shown(backend)} has KV tensors of {len(shape)} axes; seen: {dimensions}")
    # One tensor of all layers, its axes in the order in which they lie in memory.
    order = tuple(backend.get_kv_cache_stride_order(include_num_layers_dimension=True))
    return order.index(axis + 1)


def block_axes(caches: Mapping[str, Any], backends: Mapping[str, Any]) -> dict[str, int]:
    """The block axis of each tensor."""
    tensors = {name: tensor for name, tensor in caches.items() if hasattr(tensor, "data_ptr")}  # of others layout_of speaks
    return {name: block_axis(backends.get(name), tensor.dim()) for name, tensor in tensors.items()}


def layout_of(caches: Mapping[str, Any], axes: Mapping[str, int], num_blocks: int) -> KVLayout:
    """A layout of blocks as the scheduler counts them.

    Parameters
    ----------
    caches
        Tensors by layer, or one of all layers. Those that are the same memory count once.
    axes
        The block axis of each.
    num_blocks
        Of the scheduler. A kernel's blocks may be smaller; as many as make one then lie side by side.

    Raises
    ------
    LayoutError
        A layer has no single tensor, or another number of blocks.
    """
    specs: dict[str, TensorSpec] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in caches.items():
        if not hasattr(tensor, "data_ptr"):
            raise LayoutError(f"layer {name}: {type(tensor).__name__} is no tensor; states of Mamba layers are not supported")
        spec, axis = spec_of(tensor), axes[name]
        split = _split(name, spec, axis, num_blocks)
        if (same := (split.pointer, split.shape, split.strides)) not in seen:
            seen.add(same)
            specs[name] = split
    return KVLayout.from_pointers(specs, [axes[name] for name in specs])


def _split(name: str, spec: TensorSpec, axis: int, num_blocks: int) -> TensorSpec:
    """The tensor with its block axis cut into blocks of the scheduler, and blocks of the kernel behind it."""
    count = spec.shape[axis]
    ratio, rest = divmod(count, num_blocks)
    if rest or not ratio:
        raise LayoutError(f"layer {name}: {count} blocks on axis {axis} of {spec.shape} are no multiple of {num_blocks}")
    if ratio == 1:
        return spec
    stride = spec.strides[axis]
    shape = (*spec.shape[:axis], num_blocks, ratio, *spec.shape[axis + 1 :])
    strides = (*spec.strides[:axis], stride * ratio, stride, *spec.strides[axis + 1 :])
    return TensorSpec(spec.pointer, shape, strides, spec.itemsize, spec.device, spec.owner)


def canonical_layout(tensors: Sequence[Any]) -> KVLayout:
    """A layout of what newer vLLM hands to an offloading spec: (blocks, bytes) each, with strides in bytes."""
    return KVLayout.from_pointers({f"tensor {at}": spec_of(each.tensor) for at, each in enumerate(tensors)}, 0)


def current_stream(tensor: Any) -> Any:
    """The stream that torch's kernels of this thread run on, on the device of a tensor; None on the host."""
    if tensor.device.type == "cpu":
        return None
    return sys.modules["torch"].cuda.current_stream(tensor.device)
