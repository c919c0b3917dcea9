"""Serving prompts: what a prefix cost once is loaded, the rest is computed, and all that was computed is saved.

This is the file that an engine of another kind would copy. It calls kvortex in four places: ``check_blocks`` says how much of a
prompt is there, ``load_blocks`` brings it layer by layer ahead of the forward pass over the rest, ``save_blocks`` saves the
rest layer by layer behind that pass, and once more what decoding has added.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvortex
from examples.lm.model import Floats, Model
from examples.lm.pages import BLOCK_SIZE, PagedCache

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Answer:
    """What came of a prompt.

    Attributes
    ----------
    tokens
        Generated, without the one that ended it.
    logits : (vocabulary,) float32
        From which the first of them was chosen.
    first_token_s, seconds
        From the call to the first token, and to the end.
    prompt_tokens, cached_tokens
        Of the prompt, and how many of them were loaded.
    recomputed_blocks
        Blocks that were in the cache, did not come back as they had been saved, and were computed again.
    """

    tokens: list[int]
    logits: Floats
    first_token_s: float
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    recomputed_blocks: int


class Server:
    """Answers prompts one after the other, greedily.

    Parameters
    ----------
    model
    cache
        Its pages.
    engine
        Of ``cache.layout``, with ``block_size=BLOCK_SIZE``; None to compute every prompt from its first token on.
    exact
        Decode with the bits that a prompt of the same tokens has, at less than half the speed: an answer that goes on from
        blocks which decoding has saved is then the same as one that computes them again.
    """

    def __init__(
        self, model: Model, cache: PagedCache, engine: kvortex.KVortexEngine | None = None, *, exact: bool = False
    ) -> None:
        self.model, self.cache, self.engine, self.exact = model, cache, engine, exact

    def generate(
        self,
        prompt: Collection[int],
        max_new_tokens: int,
        stop: Collection[int] = (),
        on_token: Callable[[int], object] = lambda token: None,
    ) -> Answer:
        """Continues a prompt until a token of ``stop`` comes, or ``max_new_tokens`` have."""
        began = time.perf_counter()
        tokens = np.array(list(prompt), np.int64)
        sequence = _Sequence(self.model, self.cache, self.engine, tokens, max_new_tokens)
        try:
            logits = sequence.prefill()
            first_token_s, generated = time.perf_counter() - began, []
            for token in sequence.decode(logits, max_new_tokens, self.exact):
                if token in stop:
                    break
                generated.append(token)
                on_token(token)
            sequence.save_decoded(generated)
        finally:
            sequence.end()
        cached, again = sequence.cached_blocks, sequence.recomputed_blocks
        seconds = time.perf_counter() - began
        return Answer(generated, logits, first_token_s, seconds, len(tokens), cached * BLOCK_SIZE, again)


class _Sequence:
    """A prompt on its pages."""

    def __init__(
        self, model: Model, cache: PagedCache, engine: kvortex.KVortexEngine | None, tokens: Ids, max_new_tokens: int
    ) -> None:
        self._model, self._cache, self._engine, self._tokens = model, cache, engine, tokens
        self._keys = engine.key_sequence() if engine is not None else None
        self._transfers: list[kvortex.Ticket] = []
        self.cached_blocks = self.recomputed_blocks = 0
        self._pages = cache.take(len(tokens) + max_new_tokens)

    def prefill(self) -> Floats:
        """Scores of the first new token."""
        if self._engine is None or self._keys is None:
            return self._forward(0)
        keys = self._keys.extend(self._tokens)
        hits = self._count_hits(keys)
        self.cached_blocks = hits
        load = self._engine.load_blocks(keys[:hits], self._pages[:hits], layerwise=True)
        self._transfers.append(load)
        save = self._save(keys, np.arange(hits, len(keys)), layerwise=True)
        last = self._model.shape.layers - 1
        try:
            # The last layer is kept back until all blocks are known to be right: a save that lacks a layer can be given up.
            behind = (lambda layer: save.save_layer(layer) if layer != last else None) if save else None
            logits = self._forward(hits, ahead=load.wait_layer, behind=behind)
            loaded = load.wait()
        except BaseException:
            if save:
                save.abort()
            raise
        if loaded.all():
            if save:
                save.save_layer(last)
            return logits
        if save:
            save.abort()
            save.wait()
        return self._recompute(keys, np.flatnonzero(~loaded), hits)

    def _count_hits(self, keys: Any) -> int:
        """Blocks that are there from the beginning on. The last token is computed in any case: what follows it is asked for."""
        assert self._engine is not None
        found = self._engine.check_blocks(keys[: (len(self._tokens) - 1) // BLOCK_SIZE])
        return int(np.cumprod(found).sum())

    def _recompute(self, keys: Any, lost: Ids, hits: int) -> Floats:
        """Computes lost blocks of the prefix, then what follows the prefix, and saves both. The other blocks are right: a key
        names what a block holds."""
        self.cached_blocks, self.recomputed_blocks = hits - len(lost), len(lost)
        for run in np.split(lost, np.flatnonzero(np.diff(lost) > 1) + 1):
            self._forward(int(run[0]), int(run[-1]) + 1)
        logits = self._forward(hits)
        self._save(keys, np.concatenate([lost, np.arange(hits, len(keys))]))
        return logits

    def _forward(self, first: int, end: int | None = None, ahead: Any = None, behind: Any = None) -> Floats:
        """Computes the prompt from one block on, to its end or up to another block."""
        start = first * BLOCK_SIZE
        part = self._tokens[start : None if end is None else end * BLOCK_SIZE]
        hooks = {name: hook for name, hook in (("before", ahead), ("after", behind)) if hook is not None}
        return self._model.forward(part, start, self._pages, self._cache, **hooks)

    def decode(self, logits: Floats, most: int, exact: bool) -> Iterator[int]:
        """Greedily, token by token."""
        position = len(self._tokens)
        for count in range(most):
            token = int(logits.argmax())
            yield token
            if count + 1 < most:
                logits = self._model.forward(np.array([token]), position + count, self._pages, self._cache, exact=exact)

    def save_decoded(self, generated: list[int]) -> None:
        """Saves the blocks that decoding has filled. What follows the last token was not asked for: it is in no page."""
        if self._keys is not None:
            first = len(self._tokens) // BLOCK_SIZE
            self._keys.extend(generated[:-1])
            keys = self._keys.keys
            self._save(keys, np.arange(first, len(keys)))

    def _save(self, keys: Any, blocks: Ids, layerwise: bool = False) -> kvortex.Ticket | None:
        """Starts to save blocks of the sequence; None where the pool has no room, which costs the next request its hits."""
        assert self._engine is not None
        try:
            self._transfers.append(self._engine.save_blocks(keys[blocks], self._pages[blocks], layerwise=layerwise))
        except kvortex.PoolFullError:
            return None
        return self._transfers[-1]

    def end(self) -> None:
        """Gives the pages back when no transfer is at work on them any more."""
        for transfer in self._transfers:
            transfer.wait()
        self._cache.give_back(self._pages)
