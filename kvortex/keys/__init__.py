"""Names of blocks: what a block's key is made of, so that a key that is found names bytes that may be used."""

from __future__ import annotations

import functools

import numpy as np

from kvortex.errors import ConfigError, shown
from kvortex.keys.arrays import KEY_BYTES, KeyArray, KeysLike, as_keys
from kvortex.keys.chain import KvortexKeys, block_keys
from kvortex.keys.namespace import Namespace, adopt
from kvortex.keys.scheme import KeyScheme
from kvortex.keys.sequence import KeySequence
from kvortex.keys.vllm import VERSIONS, MultimodalInput, VllmKeys

__all__ = [
    "KEY_BYTES",
    "SCHEMES",
    "KeyArray",
    "KeyScheme",
    "KeySequence",
    "KeysLike",
    "KvortexKeys",
    "MultimodalInput",
    "Namespace",
    "VllmKeys",
    "adopt",
    "as_keys",
    "block_keys",
    "load_compiled",
    "make_scheme",
]

SCHEMES = (KvortexKeys.name, *VERSIONS)


def make_scheme(name: str, namespace: Namespace, *, seed: str | None = None) -> KeyScheme:
    """A way of naming blocks, by its name.

    Parameters
    ----------
    name
        One of ``SCHEMES``.
    namespace
        Model, layout, rank and the like.
    seed
        For vLLM's: ``PYTHONHASHSEED`` of its processes; see :class:`VllmKeys`.

    Raises
    ------
    ConfigError
        An unknown name, a seed where it would mean nothing, or none where it is needed.
    ArgumentError
        ``namespace`` is none.
    """
    if not isinstance(name, str) or name not in SCHEMES:
        raise ConfigError(f"key_scheme = {shown(name)}: unknown; known are {', '.join(SCHEMES)}")
    if name in VERSIONS:
        return VllmKeys(namespace, name, seed=seed)
    if seed is not None:
        raise ConfigError(f"key_seed = {shown(seed)}: means something for vLLM's key schemes only; key_scheme = 'kvortex'")
    return KvortexKeys(namespace)


@functools.cache
def load_compiled() -> None:
    """Loads all that is compiled, or compiles it, once in a process: else each first call would, and an interrupt in the
    middle of that can abort the process inside LLVM."""
    namespace = Namespace(block_size=1)
    block_keys(namespace, [0])
    scheme = VllmKeys(namespace, seed="")
    scheme.stored(scheme.block_keys([0]))
    scheme.block_keys([0], prompt_embeds=np.zeros((1, 1), np.uint8))
