"""Prompts that share a prefix have the same answers with and without kvortex, whatever becomes of their blocks."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvortex
from examples.lm.model import Model
from examples.lm.pages import BLOCK_SIZE, OutOfPagesError, PagedCache
from examples.lm.serving import Answer, Server
from examples.side_by_side import TINY, Pair, SideBySide, table
from tests.damage import flip_bit

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOT_A_NUMBER = 0x7FC0  # in bfloat16: whatever reads a page before it is written answers nonsense
PREFIX = 15 * BLOCK_SIZE


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    made = Model.random(TINY)
    yield made
    made.workers.close()


@pytest.fixture
def cache(model: Model) -> PagedCache:
    made = model.new_cache(64)
    spoil(made)
    return made


@pytest.fixture
def engine(cache: PagedCache) -> Iterator[kvortex.KVortexEngine]:
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=8 << 20, block_size=BLOCK_SIZE, model="tiny", device="host")
    with kvortex.KVortexEngine.create(config, cache.layout) as made:
        yield made


def spoil(cache: PagedCache) -> None:
    for layer in cache.layers:
        layer[:] = NOT_A_NUMBER


def prompts(count: int = 5, prefix: int = PREFIX) -> list[list[int]]:
    """They share ``prefix`` tokens."""
    rng = np.random.default_rng(5)
    shared = rng.integers(0, TINY.vocabulary, prefix).tolist()
    return [shared + rng.integers(0, TINY.vocabulary, 20 + at).tolist() for at in range(count)]


def same(cold: Answer, warm: Answer) -> bool:
    """The same tokens from nearly the same scores. (That they have the same bits depends on the machine's BLAS.)"""
    return cold.tokens == warm.tokens and bool(np.allclose(cold.logits, warm.logits, rtol=1e-4, atol=1e-3))


def test_five_prompts_have_the_same_tokens_cold_and_warm(model: Model, cache: PagedCache, engine: Any) -> None:
    cold, warm = Server(model, cache), Server(model, cache, engine)
    first = warm.generate(prompts()[0][:PREFIX], 1)
    assert first.cached_tokens == 0
    answers = []
    for prompt in prompts():
        expected = cold.generate(prompt, 64)
        spoil(cache)
        answers.append(warm.generate(prompt, 64))
        spoil(cache)
        assert same(expected, answers[-1])
        assert answers[-1].cached_tokens == PREFIX and answers[-1].recomputed_blocks == 0
        assert len(answers[-1].tokens) == 64 and 0 < answers[-1].first_token_s < answers[-1].seconds
    assert len({tuple(answer.tokens) for answer in answers}) == 5, "the suffixes matter"
    stats = engine.get_stats()
    assert stats.loaded_blocks == 5 * PREFIX // BLOCK_SIZE and stats.failed_blocks == stats.pinned_blocks == 0
    assert cache.free_pages == 64


def test_a_wrong_prefix_gives_another_answer(model: Model, cache: PagedCache, engine: Any) -> None:
    """What the other tests compare can differ."""
    prompt, other = prompts()[0], prompts()[0]
    other[40] = (other[40] + 1) % TINY.vocabulary
    cold = Server(model, cache)
    assert not same(cold.generate(prompt, 8), cold.generate(other, 8))


def test_decoded_blocks_are_found_by_the_next_turn(model: Model, cache: PagedCache, engine: Any) -> None:
    cold, warm = Server(model, cache, exact=True), Server(model, cache, engine, exact=True)
    history, known = prompts()[0], 0
    for turn, new_tokens in enumerate((44, 40, 17, 30)):  # the first answer's last token would fill a block
        answer = warm.generate(history, new_tokens)
        spoil(cache)
        assert answer.cached_tokens == known // BLOCK_SIZE * BLOCK_SIZE
        assert same(cold.generate(history, new_tokens), answer)
        spoil(cache)
        known = len(history) + len(answer.tokens) - 1  # what follows the last token was not computed
        history = history + answer.tokens + prompts()[turn][-9:]


@pytest.mark.parametrize("blocks", [(0,), (14,), (3, 4, 9), tuple(range(15))])
def test_damaged_blocks_are_computed_again(model: Model, cache: PagedCache, engine: Any, blocks: tuple[int, ...]) -> None:
    prompt = prompts()[0]
    eager: Any = Eager(engine)
    expected, warm = Server(model, cache).generate(prompt, 24), Server(model, cache, eager)
    warm.generate(prompt[:PREFIX], 1)
    keys = engine.block_keys(prompt)
    for block in blocks:
        flip_bit(engine, keys[block], 8 * 1001 + 6)  # of an exponent
    spoil(cache)
    answer = warm.generate(prompt, 24)
    assert same(expected, answer)
    assert answer.recomputed_blocks == len(blocks) and answer.cached_tokens == PREFIX - len(blocks) * BLOCK_SIZE
    assert engine.get_stats().corrupt_blocks == len(blocks)
    spoil(cache)
    again = warm.generate(prompt, 24)
    assert same(expected, again) and again.recomputed_blocks == 0
    assert again.cached_tokens == len(prompt) // BLOCK_SIZE * BLOCK_SIZE


class Proxy:
    """All of another object but what a subclass has of its own."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


class Late(Proxy):
    """An engine whose answer to ``check_blocks`` is out of date: blocks were evicted since."""

    def check_blocks(self, keys: Any) -> Any:
        return np.ones(len(keys), bool)


class EagerSave(Proxy):
    """A save that is over as soon as its last layer was announced: nobody can give it up any more."""

    def save_layer(self, layer: int) -> None:
        self._of.save_layer(layer)
        if not self._of.missing_layers:
            self._of.wait()


class Eager(Proxy):
    """An engine with such saves."""

    def save_blocks(self, *arguments: Any, **options: Any) -> Any:
        return EagerSave(self._of.save_blocks(*arguments, **options))


def test_blocks_evicted_behind_the_check_are_computed_again(model: Model, cache: PagedCache, engine: Any) -> None:
    prompt = prompts()[0]
    expected, keys = Server(model, cache).generate(prompt, 24), engine.block_keys(prompt)
    Server(model, cache, engine).generate(prompt[: 5 * BLOCK_SIZE], 1)
    spoil(cache)
    late: Any = Late(engine)
    answer = Server(model, cache, late).generate(prompt, 24)
    assert same(expected, answer)
    assert answer.cached_tokens == 5 * BLOCK_SIZE and answer.recomputed_blocks == (len(prompt) - 1) // BLOCK_SIZE - 5
    assert engine.check_blocks(keys).all(), "and saved"


def test_a_forward_that_fails_saves_nothing_and_keeps_no_page(
    model: Model, cache: PagedCache, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, warm = prompts()[0], Server(model, cache, engine)
    product, calls = model._product, []

    def failing(x: Any, weight: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:  # in the last layer
            raise ArithmeticError("planted")
        return product(x, weight)

    monkeypatch.setattr(model, "_product", failing)
    with pytest.raises(ArithmeticError):
        warm.generate(prompt, 4)
    assert not engine.check_blocks(engine.block_keys(prompt)).any()
    assert cache.free_pages == 64 and engine.get_stats().reserved_blocks == 0
    assert same(Server(model, cache).generate(prompt, 4), warm.generate(prompt, 4))


def test_a_pool_without_room_costs_hits_only(model: Model, cache: PagedCache) -> None:
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=4 * cache.layout.record_bytes, block_size=BLOCK_SIZE, device="host")
    with kvortex.KVortexEngine.create(config, cache.layout) as small:
        assert same(Server(model, cache).generate(prompts()[0], 24), Server(model, cache, small).generate(prompts()[0], 24))


@pytest.mark.parametrize("length", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 4 * BLOCK_SIZE])
def test_prompts_at_the_edges_of_blocks(model: Model, cache: PagedCache, engine: Any, length: int) -> None:
    """Of a prompt that is there as a whole the last token is computed all the same."""
    prompt, cold, warm = prompts()[0][:length], Server(model, cache), Server(model, cache, engine)
    expected = cold.generate(prompt, 3)
    for turn in range(2):
        spoil(cache)
        answer = warm.generate(prompt, 3)
        assert same(expected, answer) and answer.cached_tokens == turn * ((length - 1) // BLOCK_SIZE) * BLOCK_SIZE


def test_an_answer_stops(model: Model, cache: PagedCache) -> None:
    server, seen = Server(model, cache), []
    whole = server.generate(prompts()[0], 12)
    stop = whole.tokens[5]
    answer = server.generate(prompts()[0], 12, stop=(stop,), on_token=seen.append)
    assert answer.tokens == seen == whole.tokens[: whole.tokens.index(stop)]
    with pytest.raises(OutOfPagesError):
        server.generate(prompts()[0], 10_000)
    assert cache.free_pages == 64


def test_side_by_side_tells_what_differs() -> None:
    with SideBySide(Model.random(TINY), name="tiny", num_pages=64, pool_bytes=8 << 20) as sides:
        sides.warm.generate(prompts()[0][:PREFIX], 1)
        pair = sides.ask("first", prompts()[0], 4)
    assert pair.same_tokens and pair.times > 0 and pair.row()[:3] == ("first", str(PREFIX + 20), str(PREFIX))
    other = dataclasses.replace(pair.warm, tokens=[*pair.warm.tokens[:-1], -1], logits=pair.warm.logits + 1)
    assert Pair("x", pair.cold, other).row()[-2:] == ("NO", "NO")
    assert [len(line) for line in table([pair.row()]).splitlines()].count(len(table([pair.row()]).splitlines()[0])) == 2


def test_the_example_uses_nothing_but_the_public_interface() -> None:
    found = [problem for path in sorted(EXAMPLES.rglob("*.py")) for problem in beyond(path.read_text(encoding="utf-8"))]
    assert found == []


INSIDE = ["import kvortex.index", "from kvortex.engine import X", "engine._index", "kvortex.keys", "kvortex._x"]


@pytest.mark.parametrize("code", INSIDE)
def test_a_line_that_reaches_inside_is_seen(code: str) -> None:
    assert beyond(code)


def beyond(code: str) -> Iterator[str]:
    """Lines that import or name what kvortex does not offer, or a private attribute of anything but ``self``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvortex":
            public = node.module == "kvortex" and all(name.name in kvortex.__all__ for name in node.names)
            yield from () if public else (ast.unparse(node),)
        elif isinstance(node, ast.Import):
            yield from (ast.unparse(node) for name in node.names if name.name.startswith("kvortex."))
        elif isinstance(node, ast.Attribute):
            value = node.value.id if isinstance(node.value, ast.Name) else ""
            if (node.attr.startswith("_") and value != "self") or (value == "kvortex" and node.attr not in kvortex.__all__):
                yield ast.unparse(node)
