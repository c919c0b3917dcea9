"""The schemes ``vllm``: the block hashes of vLLM with ``--prefix-caching-hash-algo sha256_cbor``, byte for byte.

A block's hash is ``SHA-256(CBOR((hash of the block before, (token, ...), extra keys)))``, with canonical CBOR; before the
first block stands the hash of a text: the ``PYTHONHASHSEED`` of vLLM's processes, or where that is not set
``"vllm-none-hash"`` (up to 0.26: random bytes, so that nobody else can name the blocks). Extra keys are those of the LoRA,
of multimodal inputs that reach into the block, of the cache salt (first block only) and of prompt embeddings, in this order;
null where there are none. How they are written differs between versions:

=================  ============  =====================================  ==================================================
scheme             vLLM          LoRA and salt                          multimodal input; embeddings
=================  ============  =====================================  ==================================================
``vllm``           0.32, 0.33    ("lora", name, path);                  ("mm", identifier, first token - block's first);
                                 ("cache_salt", salt)                   ("prompt_embeds", SHA-256)
``vllm-0.29``      0.29          name; salt                             (identifier, first token - block's first); SHA-256
``vllm-0.20``      0.20 to 0.26  likewise, and needs a seed             likewise
``vllm-0.17``      0.17          likewise, and needs a seed             identifier; SHA-256
``vllm-0.15``      0.15          likewise, and needs a seed             identifier; the bytes themselves
=================  ============  =====================================  ==================================================

Source: ``vllm/v1/core/kv_cache_utils.py`` and ``vllm/utils/hashing.py`` of vLLM 0.15.1, 0.17.1, 0.20.2, 0.23.0, 0.26.0,
0.29.0, 0.32.0 and 0.33.0.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvortex.arguments import LARGEST, integer, refuse_masked
from kvortex.errors import ArgumentError, ConfigError, cut, shown, told
from kvortex.keys.arrays import KeyArray, Tokens
from kvortex.keys.namespace import Namespace, a_namespace, adopt
from kvortex.keys.scheme import LONGEST_SEQUENCE, KeyScheme, empty_keys
from kvortex.keys.sequence import Chain, HashBlocks

UNSET_SEED = "vllm-none-hash"
_EMPTY, _NULL = b"\x60", b"\xf6"  # the CBOR of an empty string, and of None
_MOST_AHEAD = 1 << 20
_REMEMBERED = 256  # LoRAs and salts whose texts are kept as arrays
_LONGEST = 128  # bytes of a block's CBOR besides tokens, texts, inputs and embeddings; generously
_LONGEST_INPUT = 48  # bytes of heads, tag and offset


class _Version(NamedTuple):
    """What differs; the first three are of :class:`kvortex.keys._loops.Rules`."""

    offsets: bool
    digests: bool
    late: int  # 0.15 and 0.17 count an input that ends where the block begins, if it lies around the one before it
    tagged: bool
    unset_seed: str | None


VERSIONS = {
    "vllm": _Version(True, True, 0, True, UNSET_SEED),
    "vllm-0.29": _Version(True, True, 0, False, UNSET_SEED),
    "vllm-0.20": _Version(True, True, 0, False, None),
    "vllm-0.17": _Version(False, True, 1, False, None),
    "vllm-0.15": _Version(False, False, 1, False, None),
}


class MultimodalInput(NamedTuple):
    """An image, a sound or the like in a prompt.

    ``identifier`` is what vLLM calls so (``mm_features[i].identifier``), ``offset`` the place of its first placeholder
    token in the sequence, ``length`` how many there are.
    """

    identifier: str
    offset: int
    length: int


class VllmKeys(KeyScheme):
    """vLLM's block hashes. They name content only: :meth:`stored` puts them into the namespace.

    Parameters
    ----------
    namespace
        What else decides what bytes a block has; ``block_size`` is vLLM's (its ``hash_block_size``), ``lora`` and ``salt``
        count for sequences that name none of their own.
    version
        Name of the scheme, a key of ``VERSIONS``.
    seed
        ``PYTHONHASHSEED`` of vLLM's processes, as it is written there; None where it is not set.
    ahead
        Tokens behind a block that its hash covers too: 0, unless vLLM (0.33) drafts by a model that looks ahead.

    Raises
    ------
    ConfigError
        An unknown version; no seed where the version needs one; a LoRA without its path where the version hashes that.
    ArgumentError
        ``namespace`` is none, or ``ahead`` no integer from 0 on.
    """

    def __init__(self, namespace: Namespace, version: str = "vllm", *, seed: str | None = None, ahead: int = 0) -> None:
        if not isinstance(version, str) or version not in VERSIONS:
            raise ConfigError(f"key_scheme = {shown(version)}: unknown; known of vLLM are {', '.join(VERSIONS)}")
        self.name, self.namespace, self.block_size = version, a_namespace(namespace), namespace.block_size
        self._version = VERSIONS[version]
        self._ahead = integer(ahead, "ahead", 0, _MOST_AHEAD)
        text = self._version.unset_seed if seed is None else seed
        if text is None:
            why = "starts from random bytes where PYTHONHASHSEED is not set, so nobody else can name its blocks"
            raise ConfigError(f"key_seed = None: {version} {why}. Set it for vLLM's processes, and key_seed to the same")
        self._first = hashlib.sha256(_text(text, "key_seed", ConfigError)).digest()
        self._without_inputs = functools.lru_cache(_REMEMBERED)(self._chain)
        try:
            self.chain()
        except ArgumentError as error:
            raise ConfigError(str(error)) from None

    def chain(  # type: ignore[override]
        self,
        *,
        lora: str | tuple[str, str] | None = None,
        salt: str | None = None,
        multimodal: Iterable[tuple[str, int, int]] = (),
        prompt_embeds: npt.NDArray[Any] | None = None,
    ) -> Chain:
        """How a sequence is named.

        Parameters
        ----------
        lora
            Name of the LoRA and, for ``vllm``, where it lies: ``"name=path"`` as in vLLM's ``--lora-modules``, or both as a
            tuple; ``""`` for none; None for the namespace's.
        salt
            The request's ``cache_salt``; ``""`` for none; None for the namespace's.
        multimodal
            :class:`MultimodalInput` or such tuples, for the whole sequence, in the order of their places.
        prompt_embeds : (prompt tokens, ...) array of any dtype
            Embeddings of the whole prompt, whose bytes are hashed. vLLM's token ids are then all 0.

        Raises
        ------
        ArgumentError
            One of them cannot be; the message names it.
        """
        inputs = _inputs(multimodal)
        if inputs or prompt_embeds is not None or not isinstance(lora, str | None) or not isinstance(salt, str | None):
            return self._chain(lora, salt, inputs, prompt_embeds)
        return self._without_inputs(lora, salt)  # which takes ten times as long to make as a block takes to hash

    def _chain(self, lora: Any, salt: Any, inputs: Sequence[MultimodalInput] = (), prompt_embeds: Any = None) -> Chain:
        name, path = (_text(part, "lora") for part in self._lora(self.namespace.lora if lora is None else lora))
        salt = self.namespace.salt if salt is None else salt
        tagged, secret = self._version.tagged, _text(salt, "salt")
        own = _entry("lora" * tagged, *((name, path) if tagged else (name,))) if name != _EMPTY else b""
        secret = _entry("cache_salt" * tagged, secret) if salt else b""
        placed = bool(inputs) or prompt_embeds is not None
        make = self._placed(own, secret, inputs, prompt_embeds) if placed else self._alike(own, secret)
        return Chain(
            first=self._first, block_size=self.block_size, most=LARGEST, hash_blocks=make, ahead=self._ahead, placed=placed
        )

    def _alike(self, own: bytes, secret: bytes) -> HashBlocks:
        """For sequences of which all blocks, but for the salt in the first, have the same extra keys."""
        from kvortex.keys import _sha_ni
        from kvortex.keys._loops import bytes_of, hash_alike

        size, ahead = self.block_size, self._ahead
        begin = [part for part in (own, secret) if part]
        first, others = (_array(len(parts)) + b"".join(parts) if parts else _NULL for parts in (begin, [own] * bool(own)))
        at_first, later = (bytes_of(first + others), len(first)), (bytes_of(others + others), len(others))

        def hash_blocks(tokens: Tokens, parent: bytes, start: int) -> KeyArray:
            keys = empty_keys(max(0, len(tokens) - ahead) // size)
            if len(keys):
                extras = later if start else at_first
                hash_alike(tokens, size, bytes_of(parent), *extras, ahead, keys, _sha_ni.available())
            return keys

        return hash_blocks

    def _placed(self, own: bytes, secret: bytes, inputs: Sequence[MultimodalInput], prompt_embeds: Any) -> HashBlocks:
        """For sequences whose blocks have extra keys that depend on their places."""
        from kvortex.keys import _sha_ni
        from kvortex.keys._loops import Content, Rules, bytes_of, hash_placed

        size, ahead, (offsets, digests, late, tagged, _) = self.block_size, self._ahead, self._version
        parts = [own, secret, _entry("prompt_embeds", more=1) if tagged else b""]
        parts += [_entry("mm" * tagged, _text(each.identifier, "identifier"), more=offsets) for each in inputs]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        spans = np.array([each[1:] for each in inputs], np.int64).reshape(-1, 2)
        content = Content(bytes_of(b"".join(parts)), ends, spans, _rows_of_bytes(prompt_embeds))
        rules = Rules(offsets, digests, late, ahead)
        raw = 0 if digests else content.embeds.shape[1] * (size + ahead)
        room = _LONGEST + 9 * (size + ahead) + len(content.text) + _LONGEST_INPUT * len(inputs) + raw

        def hash_blocks(tokens: Tokens, parent: bytes, start: int) -> KeyArray:
            keys = empty_keys(max(0, len(tokens) - ahead) // size)
            if len(keys):
                hash_placed(tokens, start, size, bytes_of(parent), content, rules, room, keys, _sha_ni.available())
            return keys

        return hash_blocks

    def stored(self, keys: KeyArray) -> KeyArray:
        """The hashes in the namespace; see :func:`kvortex.keys.adopt`."""
        return adopt(self.namespace, keys)

    def _lora(self, lora: Any) -> tuple[Any, ...]:
        """Name and path of a LoRA, which are both empty where there is none."""
        pair = lora if isinstance(lora, tuple) else tuple(lora.split("=", 1)) if isinstance(lora, str) else (lora, "")
        if len(pair) == 1 and (not lora or not self._version.tagged):
            pair = (*pair, "")
        if len(pair) != 2 or (not pair[0] and pair[1]):
            how = f'{self.name} hashes its name and path: pass "name=path", or both as a tuple'
            raise ArgumentError(f"lora = {shown(lora)}: {how}")
        return pair


def _entry(tag: str, *texts: bytes, more: int = 0) -> bytes:
    """An extra key with its tag, if it has one, but for so many items that follow it: an array, unless it is one text."""
    items = [_text(tag, "tag"), *texts] if tag else [*texts]
    count = len(items) + more
    return (_array(count) if count > 1 else b"") + b"".join(items)


def _array(count: int) -> bytes:
    """The head of an array of up to 23 items."""
    return bytes([0x80 | count])


def _text(text: Any, name: str, kind: type[ArgumentError] | type[ConfigError] = ArgumentError) -> bytes:
    """The CBOR of a string."""
    from kvortex.keys._cbor import LONGEST_HEAD, TEXT, write_string
    from kvortex.keys._loops import bytes_of

    if not isinstance(text, str):
        raise kind(f"{name} = {shown(text)}: must be a string")
    try:
        data = bytes_of(text.encode())
    except UnicodeEncodeError as error:
        raise kind(f"{name} = {shown(text)}: cannot be written as UTF-8: {told(error)}") from None
    buffer = np.empty(len(data) + 2 * LONGEST_HEAD, np.uint8)
    return buffer[: write_string(buffer, 0, TEXT, data, 0, len(data))].tobytes()


def _inputs(multimodal: Any) -> list[MultimodalInput]:
    try:
        inputs = [MultimodalInput(*each) for each in multimodal]
    except Exception as error:
        how = "must be a sequence of (identifier, offset, length)"
        raise ArgumentError(f"multimodal = {shown(multimodal)}: {how}: {told(error)}") from error
    before = 0
    for at, each in enumerate(inputs):
        before = integer(each.offset, f"multimodal[{at}].offset", before, LONGEST_SEQUENCE)  # in order
        integer(each.length, f"multimodal[{at}].length", 1, LONGEST_SEQUENCE)
    return inputs


def _rows_of_bytes(prompt_embeds: Any) -> npt.NDArray[np.uint8]:
    """A row of bytes for each token; (0, 0) without embeddings."""
    if prompt_embeds is None:
        return np.empty((0, 0), np.uint8)
    refuse_masked(prompt_embeds, "prompt_embeds")
    good = isinstance(prompt_embeds, np.ndarray) and not prompt_embeds.dtype.hasobject
    if not good or prompt_embeds.ndim < 2 or not prompt_embeds.size:
        seen = f"shape {prompt_embeds.shape}, dtype {cut(str(prompt_embeds.dtype))}" if good else type(prompt_embeds).__name__
        raise ArgumentError(f"prompt_embeds must be a NumPy array, a row a token, of at least one; seen: {seen}")
    return bytes_of_rows(prompt_embeds)


def bytes_of_rows(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """A copy of an array as (rows, bytes) uint8, contiguous and writable: callers may change theirs while a sequence grows."""
    return np.array(array, order="C", subok=False).reshape(len(array), -1).view(np.uint8)
