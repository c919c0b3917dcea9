"""What vLLM hands over, without torch: tensors by their methods, backends by their shapes, requests by their hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from kvortex.devices import Device
from tests.pages import PagedCache, Tensor


class FakeTensor:
    """A torch tensor, as far as adapters may look: strides are counted in elements."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        kind, _, index = tensor.device.name.partition(":")
        self.device = SimpleNamespace(type="cpu" if kind == "host" else kind, index=int(index) if index else None)
        self.shape = tensor.shape

    def data_ptr(self) -> int:
        return self.tensor.buffer.address + self.tensor.shift

    def stride(self) -> tuple[int, ...]:
        assert not any(stride % self.tensor.itemsize for stride in self.tensor.strides)
        return tuple(stride // self.tensor.itemsize for stride in self.tensor.strides)

    def element_size(self) -> int:
        return self.tensor.itemsize

    def dim(self) -> int:
        return len(self.shape)


class Backend:
    """An attention backend of vLLM up to 0.28: it says in which shape it wants a cache of so many blocks."""

    def __init__(self, shape: Sequence[Any], across: Sequence[int] | None = None) -> None:
        self._shape, self._across = shape, across

    def get_kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        named = {"B": num_blocks, "N": block_size, "H": num_kv_heads, "D": head_size}
        return tuple(named.get(each, each) for each in self._shape)

    def get_kv_cache_stride_order(self, include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        if self._across is None or not include_num_layers_dimension:
            raise NotImplementedError
        return tuple(self._across)


def caches_of(cache: PagedCache) -> dict[str, FakeTensor]:
    """The tensors of a paged cache, by layer."""
    return {f"layers.{at}": FakeTensor(tensor) for at, tensor in enumerate(cache.tensors)}


def tensors_of(device: Device, layers: int, shape: Sequence[int], itemsize: int = 2, **more: Any) -> list[Tensor]:
    return [Tensor(device, shape, itemsize, **more) for _ in range(layers)]


def hashes_of(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """A chain of hashes of full blocks, as vLLM's requests have it."""
    chain, parent = [], b"none"
    for at in range(len(tokens) // block_size):
        parent = hashlib.sha256(parent + repr(tuple(tokens[at * block_size : (at + 1) * block_size])).encode()).digest()
        chain.append(parent)
    return chain


class FakeRequest:
    """A request of vLLM's scheduler."""

    def __init__(self, name: str, tokens: Sequence[int], block_size: int) -> None:
        self.request_id, self.tokens, self._block_size = name, list(tokens), block_size
        self.num_prompt_tokens = len(tokens)
        self.block_hashes = hashes_of(tokens, block_size)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def grow(self, *tokens: int) -> None:
        self.tokens.extend(tokens)
        self.block_hashes[:] = hashes_of(self.tokens, self._block_size)


def output_of(
    new: Sequence[tuple[str, list[int], int, int]] = (),
    cached: Sequence[tuple[str, list[int] | None, int, int]] = (),
    resumed: Sequence[str] = (),
) -> Any:
    """A SchedulerOutput: of each request its name, its new pages, tokens that are computed, and tokens of this step."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=n, block_ids=(p,), num_computed_tokens=c) for n, p, c, _ in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[n for n, *_ in cached],
            new_block_ids=[None if p is None else (p,) for _, p, *_ in cached],
            num_computed_tokens=[c for *_, c, _ in cached],
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens={n: s for n, _, _, s in [*new, *cached]},
    )
