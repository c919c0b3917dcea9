"""Where every fragment of every block is: the one thing that transfers need to know about a model's KV tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import LayoutError, cut, shown, told
from kvortex.layout.checks import refusal, seen
from kvortex.layout.fingerprint import fingerprint
from kvortex.layout.fragments import MAX_BLOCKS, MAX_FRAGMENTS, TensorBlocks, cut_tensor, merge
from kvortex.layout.overlap import find_overlap
from kvortex.layout.tensors import TensorSpec, tensor_spec

_OptionalAxes = int | Sequence[int | None] | None
TensorLayer = tuple[int, tuple[int, ...], tuple[int, ...]]
_MORE = 100  # axes than there can be, to be told how many there are; they may go on for ever
_PROTOCOLS = ("__dlpack__", "__cuda_array_interface__", "__array_interface__")


@dataclass(frozen=True, eq=False, repr=False)
class KVLayout:
    """Where the bytes of each block are, and in which order they make a record. Immutable.

    Built by :meth:`from_arrays` or :meth:`from_pointers`. A record is *page-first*: the layers one after the other (a
    tensor is a layer, or as many layers as its layer axis counts), within a layer the fragments in the logical order
    of the axes that separate them, packed without padding.

    Attributes
    ----------
    num_blocks
        Blocks in every tensor.
    device
        ``"host"`` or ``"cuda:N"``, the same for all tensors.
    fragments
        int64, shape (F, 4), read-only: address in block 0, bytes from one block to the next (0 if there is one
        block), offset in the record, and bytes. Fragments that touch are one, also across layers and tensors.
    record_bytes
        Bytes of one block's record.
    layer_offsets
        int64, shape (L + 1,), read-only: offset in the record where each layer begins, and the record's end. A
        fragment may span several layers.
    fingerprint
        32 bytes. Equal for layouts whose records mean the same, whatever their addresses, device, padding and number
        of blocks; different for NHD and HND.
    alignment
        The largest power of two up to 16 that divides every base, block stride, record offset and size.
    order
        The caller's label.
    layers
        Of each layer of each tensor: bytes of an element, elements along each axis of a block, and bytes in the record from
        one index to the next along each. What records mean, for codecs.
    owners
        The arrays, kept alive as long as the layout is. Memory given by raw pointers is the caller's to keep.
    """

    num_blocks: int
    device: str
    fragments: NDArray[np.int64]
    record_bytes: int
    layer_offsets: NDArray[np.int64]
    fingerprint: bytes
    alignment: int
    order: str
    owners: tuple[Any, ...]
    layers: tuple[TensorLayer, ...] = ()

    @classmethod
    def from_arrays(
        cls, arrays: Any, block_axis: int | Sequence[int] = 0, layer_axis: _OptionalAxes = None, *, order: str = ""
    ) -> KVLayout:
        """Describe the KV tensors of a model, as arrays of any library.

        Parameters
        ----------
        arrays
            One array, a sequence of arrays, or a mapping of names to arrays, whose order is kept. Any object that
            speaks DLPack or an array interface, and TensorSpec; see :func:`kvortex.layout.tensors.tensor_spec`.
        block_axis
            The axis that counts blocks, or one for each tensor. Negative axes count from the end.
        layer_axis
            The axis that counts layers, where one tensor holds several; or one for each tensor, None where there is none.
        order
            A free label, such as "NHD", that becomes part of the fingerprint.

        Returns
        -------
        KVLayout
            Keeps the arrays alive. Nothing is copied, and no stream is waited for.

        Raises
        ------
        LayoutError
            The tensors are no blocks of bytes; the message shows the pointer, shape and strides, and what to change.
        """
        specs = []
        for label, array in _items(arrays, "arrays", _is_array):
            try:
                specs.append((label, tensor_spec(array)))
            except LayoutError as error:
                raise LayoutError(f"{label}: {error}") from error
        return _build(specs, block_axis, layer_axis, order)

    @classmethod
    def from_pointers(
        cls,
        specs: Any,
        block_axis: int | Sequence[int] = 0,
        layer_axis: _OptionalAxes = None,
        *,
        order: str = "",
        device: str = "cuda:0",
    ) -> KVLayout:
        """Describe the KV tensors of a model by raw numbers.

        Parameters
        ----------
        specs
            One, a sequence, or a mapping of names to: TensorSpec, or tuples (pointer, shape, strides in bytes, itemsize).
        block_axis, layer_axis, order
            As in :meth:`from_arrays`.
        device
            Where the tuples' memory is: ``"host"`` or ``"cuda:N"``. A TensorSpec says that itself.

        Returns
        -------
        KVLayout
            Keeps the specs' owners alive. Memory without an owner must outlive the layout.

        Raises
        ------
        LayoutError
            As in :meth:`from_arrays`.
        """
        items = _items(specs, "specs", _is_spec)
        return _build([(label, _spec(spec, label, device)) for label, spec in items], block_axis, layer_axis, order)

    @property
    def num_layers(self) -> int:
        """Layers in a record: tensors, or the sum of their layer axes."""
        return len(self.layer_offsets) - 1

    def describe(self) -> str:
        """One line for people: blocks, record, fragments, device, fingerprint."""
        sizes = self.fragments[:, 3]
        low, high = int(sizes.min()), int(sizes.max())
        each = f"{low} bytes" if low == high else f"{low} to {high} bytes"
        label = f", order {cut(self.order)}" if self.order else ""
        return (
            f"{self.num_blocks} blocks of {self.record_bytes} bytes on {self.device}: {self.num_layers} layers, "
            f"{len(sizes)} fragments of {each}, aligned to {self.alignment}{label}, fingerprint {self.fingerprint.hex()[:12]}"
        )

    def __repr__(self) -> str:
        return f"KVLayout({self.describe()})"


def _build(
    specs: list[tuple[str, TensorSpec]], block_axis: int | Sequence[int], layer_axis: _OptionalAxes, order: str
) -> KVLayout:
    _check_order(order)
    block_axes = _axes(block_axis, "block_axis", len(specs))
    layer_axes = _axes(layer_axis, "layer_axis", len(specs))
    tensors = [
        cut_tensor(spec, block, layer, label)
        for (label, spec), block, layer in zip(specs, block_axes, layer_axes, strict=True)
    ]
    _check_together(specs, tensors)
    fragments = _fragment_table(specs, tensors)
    layers = [nbytes for blocks in tensors for nbytes in [int(blocks.nbytes.sum()) // blocks.num_layers] * blocks.num_layers]
    layer_offsets = np.cumsum([0, *layers], dtype=np.int64)
    fragments.setflags(write=False)
    layer_offsets.setflags(write=False)
    bits = int(np.bitwise_or.reduce(fragments, axis=None)) | 16
    return KVLayout(
        num_blocks=tensors[0].num_blocks,
        device=specs[0][1].device,
        fragments=fragments,
        record_bytes=int(layer_offsets[-1]),
        layer_offsets=layer_offsets,
        fingerprint=fingerprint([(spec.itemsize, cut) for (_, spec), cut in zip(specs, tensors, strict=True)], order),
        alignment=bits & -bits,
        order=order,
        owners=tuple(spec.owner for _, spec in specs if spec.owner is not None),
        layers=tuple(
            (spec.itemsize, blocks.shape, blocks.record_strides)
            for (_, spec), blocks in zip(specs, tensors, strict=True)
            for _ in range(blocks.num_layers)
        ),
    )


def _check_order(order: object) -> None:
    try:
        if not isinstance(order, str):
            raise TypeError("a label is a str")
        order.encode()
    except Exception as error:  # a lone surrogate has no bytes, and so no fingerprint
        raise LayoutError(f"order={shown(order)} is no text; give a label such as 'NHD'") from error


def _check_together(specs: list[tuple[str, TensorSpec]], tensors: list[TensorBlocks]) -> None:
    """Refuse tensors that are each fine, but no blocks of one model."""
    (first_label, first), head = specs[0], tensors[0]
    for (label, spec), blocks in zip(specs, tensors, strict=True):
        if blocks.num_blocks != head.num_blocks:
            raise refusal(label, spec, f"it has {blocks.num_blocks} blocks, but {first_label} has {head.num_blocks} "
                          f"({seen(first)})", "All tensors need the same number of blocks; check block_axis.")
        if spec.device != first.device:
            raise refusal(label, spec, f"it is on {spec.device}, but {first_label} is on {first.device}",
                          "Make one layout for each device.")
    if head.num_blocks > MAX_BLOCKS:
        raise LayoutError(f"{first_label} has {head.num_blocks} blocks, more than {MAX_BLOCKS}. Check block_axis.")
    total = sum(len(blocks.bases) for blocks in tensors)
    if total > MAX_FRAGMENTS:
        raise LayoutError(f"a block would be {total} fragments over {len(specs)} tensors, more than {MAX_FRAGMENTS}; the first "
                          f"tensor: {seen(first)}. Check block_axis.")


def _fragment_table(specs: list[tuple[str, TensorSpec]], tensors: list[TensorBlocks]) -> NDArray[np.int64]:
    """All tensors' fragments in record order, as rows of (base, block stride, record offset, bytes)."""
    counts = [len(blocks.bases) for blocks in tensors]
    bases = np.concatenate([blocks.bases for blocks in tensors])
    nbytes = np.concatenate([blocks.nbytes for blocks in tensors])
    strides = np.repeat(np.array([blocks.block_stride for blocks in tensors], np.int64), counts)
    clash = find_overlap(bases, strides, nbytes, tensors[0].num_blocks)
    if clash is not None:
        which = sorted(np.searchsorted(np.cumsum(counts), clash, side="right"))
        (label, spec), (other_label, other) = (specs[i] for i in which)
        raise refusal(other_label, other, f"it shares bytes with {label} ({seen(spec)})",
                      "Pass each tensor once, and views that do not overlap.")
    if tensors[0].num_blocks > 1:
        # Tensors whose blocks interleave lie in one allocation. With a single block they may be neighbours by chance,
        # and a copy across the border of two allocations is refused by the driver.
        starts, nbytes = merge(bases, strides, nbytes)
        bases, strides = bases[starts], strides[starts]
    offsets = np.cumsum(nbytes) - nbytes
    return np.ascontiguousarray(np.stack((bases, strides, offsets, nbytes), axis=1))


def _items(given: Any, what: str, is_one: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """One thing, a sequence of things or a mapping to things, each with what messages call it."""
    if is_one(given):
        return [("tensor 0", given)]
    try:
        # No more than there can be, should it go on for ever.
        if isinstance(given, Mapping):
            items = [(f"tensor {shown(name)}", item) for name, item in islice(given.items(), MAX_FRAGMENTS + 1)]
        elif _is_collection(given):
            items = [(f"tensor {index}", item) for index, item in enumerate(islice(given, MAX_FRAGMENTS + 1))]
        else:
            items = [("tensor 0", given)]  # no array and no collection: read it, for the message that says so
    except Exception as error:
        raise LayoutError(f"{what} cannot be read: {told(error)}") from error
    if not items:
        raise LayoutError(f"{what} is empty; a layout needs at least one tensor")
    if len(items) > MAX_FRAGMENTS:
        raise LayoutError(f"{what} holds more than {MAX_FRAGMENTS} tensors")
    return items


def _is_collection(given: Any) -> bool:
    """Arrays of no dimension say that they can be iterated, and cannot."""
    is_scalar = isinstance(given, np.ndarray) and given.ndim == 0
    return isinstance(given, Iterable) and not isinstance(given, (str, bytes)) and not is_scalar


def _is_array(given: Any) -> bool:
    return isinstance(given, (TensorSpec, np.ndarray)) or any(hasattr(type(given), name) for name in _PROTOCOLS)


def _is_spec(given: Any) -> bool:
    return isinstance(given, TensorSpec) or (isinstance(given, tuple) and bool(given) and hasattr(given[0], "__index__"))


def _spec(spec: Any, label: str, device: str) -> TensorSpec:
    try:
        if isinstance(spec, TensorSpec):
            return spec
        if isinstance(spec, (tuple, list)) and len(spec) == 4:
            pointer, shape, strides, itemsize = spec
            return TensorSpec(pointer, shape, strides, itemsize, device)
    except LayoutError as error:
        raise LayoutError(f"{label}: {error}") from error
    raise LayoutError(f"{label}: {shown(spec)} is no TensorSpec and no tuple (pointer, shape, strides in bytes, itemsize)")


def _axes(given: Any, what: str, count: int) -> list[Any]:
    """One axis for each tensor. Whether each is an integer in range is judged beside its tensor's shape."""
    if not _is_collection(given):
        return [given] * count
    try:
        axes = list(islice(given, count + _MORE))
    except Exception as error:
        raise LayoutError(f"{what}={shown(given)} cannot be read: {told(error)}") from error
    if len(axes) != count:
        names = len(axes) if len(axes) < count + _MORE else f"{len(axes)} or more"
        raise LayoutError(f"{what} names {names} axes for {count} tensors; give one axis, or one for each tensor")
    return axes
