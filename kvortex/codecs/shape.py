"""What a record's bytes mean: the one place where kvortex looks at more of them than addresses and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvortex.errors import CodecError, shown

DTYPES = {"bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
ORDERS = ("NHD", "HND")
PARTS = ("KV", "L")
Addresses = npt.NDArray[np.uint64]
TensorLayer = tuple[int, tuple[int, ...], tuple[int, ...]]  # as kvortex.layout has it, which is on the same floor


@dataclass(frozen=True)
class RecordShape:
    """A record as planes of ``tokens`` rows of ``channels`` values, side by side in the order of the record.

    Parameters
    ----------
    layers, heads, head_dim
        Of the model's slice that one record holds. Of MLA: 1 head of the latent's width.
    tokens
        In a block.
    order
        ``"NHD"``: a plane is a layer's K or V, [token][head][dim]. ``"HND"``: a plane is one head of it, [token][dim].
    parts
        ``"KV"``: K, then V, of each layer. ``"L"``: one latent of each layer (MLA).
    dtype
        One of ``DTYPES``.

    Raises
    ------
    CodecError
        A field has an impossible value; the message names it.
    """

    layers: int
    heads: int
    head_dim: int
    tokens: int = 16
    order: str = "NHD"
    parts: str = "KV"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_dim", "tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
                raise CodecError(f"{name} = {shown(value)}: must be an integer from 1 to 2**20")
        for name, known in (("order", ORDERS), ("parts", PARTS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise CodecError(f"{name} = {shown(getattr(self, name))}: must be one of {', '.join(known)}")

    @property
    def channels(self) -> int:
        """Values in a row of a plane."""
        return self.head_dim * (self.heads if self.order == "NHD" else 1)

    @property
    def planes(self) -> int:
        """In a record."""
        return self.layers * len(self.parts) * (self.heads if self.order == "HND" else 1)

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return DTYPES[self.dtype]

    @property
    def plane_bytes(self) -> int:
        """Bytes of a plane."""
        return self.tokens * self.channels * self.itemsize

    @property
    def raw_bytes(self) -> int:
        """Bytes of a record as it lies in the pages."""
        return self.planes * self.plane_bytes

    @cached_property
    def parts_of_planes(self) -> str:
        """A letter for each plane, of ``parts``."""
        each = self.heads if self.order == "HND" else 1
        return "".join(part * each for part in self.parts) * self.layers

    def describe(self) -> bytes:
        """The fields as bytes, for digests."""
        return ";".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self)).encode()

    def refusal(self, layers: Sequence[TensorLayer]) -> str | None:
        """Why these tensors' blocks are no such records, as far as shapes tell; None where they are.

        Parameters
        ----------
        layers
            ``KVLayout.layers``: bytes of an element, sizes of axes, and bytes in the record from one index to the next, of
            each layer of each tensor. A layer of the model is one of them, or, with ``parts`` of ``"KV"``, two: K, then V.
        """
        apart = len(self.parts) > 1 and len(layers) == self.layers * len(self.parts)
        if len(layers) != self.layers and not apart:
            return f"they have {len(layers)} layers, and the tables are of {self.layers}"
        before = () if apart else (len(self.parts),)
        rows = (self.heads, self.tokens, self.head_dim) if self.order == "HND" else (self.tokens, self.heads, self.head_dim)
        wanted = [size for size in (*before, *rows) if size > 1]
        joined = [size for size in (*before, self.tokens, self.channels) if size > 1]  # heads that are no axis of their own
        for itemsize, sizes, strides in dict.fromkeys(layers):
            seen = [size for _, size in sorted(zip(strides, sizes, strict=True), reverse=True) if size > 1]
            if itemsize != self.itemsize or seen != wanted and (self.order != "NHD" or seen != joined):
                mine, theirs = (" x ".join(map(str, each)) for each in (wanted, seen))
                return (f"a layer of a block is {theirs} elements of {itemsize} bytes, in the order of memory, "
                        f"and the tables are for {mine} of {self.itemsize}")
        return None

    def plane_addresses(self, fragments: npt.NDArray[np.int64]) -> Addresses:
        """Where kernels find the planes in the pages of a layout.

        Parameters
        ----------
        fragments : (F, 4) int64
            ``KVLayout.fragments``: address in block 0, block stride, offset in the record, bytes.

        Returns
        -------
        numpy.ndarray
            (planes, 2) uint64: address in block 0, and bytes from one block to the next.

        Raises
        ------
        CodecError
            The layout's records are of another size, or a plane does not lie contiguous there.
        """
        record_bytes = int(fragments[:, 3].sum())
        if record_bytes != self.raw_bytes:
            mine = f"{self.describe().decode()} has {self.raw_bytes}"
            raise CodecError(f"the layout's records have {record_bytes} bytes, and {mine}")
        begins = np.arange(self.planes, dtype=np.int64) * self.plane_bytes
        at = np.searchsorted(fragments[:, 2], begins, side="right") - 1
        inside = begins - fragments[at, 2]
        if (inside + self.plane_bytes > fragments[at, 3]).any():
            least = int(fragments[:, 3].min())
            raise CodecError(f"a plane of {self.plane_bytes} bytes is no contiguous part of a page, whose fragments have "
                             f"{least} bytes or more; check order, heads and tokens")
        return np.stack((fragments[at, 0] + inside, fragments[at, 1]), axis=1).astype(np.uint64)
