"""The schemes ``vllm``: vLLM's own vectors, and hashlib + cbor2 block after block."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.config import _KEY_SCHEMES
from kvortex.errors import ArgumentError, ConfigError
from kvortex.keys import SCHEMES, KvortexKeys, MultimodalInput, Namespace, VllmKeys, _sha_ni, adopt, block_keys, make_scheme
from kvortex.keys.vllm import VERSIONS
from tests.naive_keys import extra_keys, sha256_cbor, vllm_hashes, vllm_request, walked

NEED_A_SEED = ("vllm-0.15", "vllm-0.17", "vllm-0.20")
# Printed by vLLM's own functions (0.15.1 and 0.29 or newer), block size 16, tokens 0 to 31: NONE_HASH, block 0, block 1.
SEED_0 = (
    "4e1195df020de59e0d65a33a4279f1183e7ae4e5d980e309f8b55adff2e61c3e",
    "d830de3d42c00f25a2949b5d12d98642664a44872c1614c5b0147556276afc9c",
    "fedd9e4abebebbe6f6cf96b682f08d316063fe2f22a5c552192dd62904fcccac",
)
UNSET = (
    "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0",
    "dc918a88b139e5afe60b88eda27508d4aee16c10fdc354791efea06206ac0749",
    "c300ec275d7bf08af8fc63e76cdc0086911bbc7091e03c5cf892553bef84ef0c",
)
SALTED = {
    "vllm": "ca48a27179dbd18d998b54074914523e7a625e9628549ad2f67859d2f639b65c",
    "vllm-0.15": "108ab3ec688f26e8a4fa13182752521255a443958a0cdfe1afd224040e80ac21",
}

tokens_of_any_width = st.integers(0, 63).flatmap(lambda bits: st.integers(0, 2**bits - 1))
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300)


@pytest.fixture(params=["plain", "hardware"])
def hardware(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of hashing."""
    if request.param == "plain":
        monkeypatch.setattr(_sha_ni, "available", lambda: False)
    elif not _sha_ni.available():
        pytest.skip("this CPU has no SHA instructions that kvortex uses")


def scheme(version: str = "vllm", seed: str | None = "0", block_size: int = 16, **options: Any) -> VllmKeys:
    return VllmKeys(Namespace(block_size=block_size), version, seed=seed, **options)


def rows(keys: np.ndarray) -> list[bytes]:
    assert keys.dtype == np.uint8 and keys.ndim == 2 and keys.flags.c_contiguous and keys.flags.writeable
    return [row.tobytes() for row in keys]


@pytest.mark.usefixtures("hardware")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seed", ["0", None])
def test_vectors_of_vllm_itself(version: str, seed: str | None) -> None:
    if seed is None and version in NEED_A_SEED:
        with pytest.raises(ConfigError, match=rf"key_seed = None: {version} .*PYTHONHASHSEED"):
            scheme(version, seed)
        return
    expected = UNSET if seed is None else SEED_0
    made = scheme(version, seed)
    assert made.chain().first.hex() == expected[0]
    assert [key.hex() for key in rows(made.block_keys(range(32)))] == list(expected[1:])


@pytest.mark.usefixtures("hardware")
@pytest.mark.parametrize(("version", "expected"), SALTED.items())
def test_vectors_with_a_salt(version: str, expected: str) -> None:
    assert scheme(version).block_keys(range(16), salt="abc").tobytes().hex() == expected


def test_the_bytes_under_the_hash() -> None:
    """Of the notes on vLLM: CBOR of tokens of all widths."""
    tokens = (0, 23, 24, 255, 256, 65535, 65536)
    message = bytes.fromhex("835820" + SEED_0[0] + "870017181818ff19010019ffff1a00010000f6")
    assert message == cbor2.dumps((bytes.fromhex(SEED_0[0]), tokens, None), canonical=True)
    assert scheme(block_size=7).block_keys(tokens).tobytes() == hashlib.sha256(message).digest()


@given(st.lists(tokens_of_any_width, max_size=60), st.integers(1, 40), st.text(max_size=30).filter(str.isprintable), st.data())
def test_any_tokens_any_block_size_any_seed(tokens: list[int], block_size: int, seed: str, data: st.DataObject) -> None:
    made = scheme(seed=seed, block_size=block_size)
    expected = vllm_hashes(tokens, block_size, sha256_cbor(seed))
    assert rows(made.block_keys(tokens)) == expected
    if expected:
        at = data.draw(st.integers(1, len(expected)))
        assert rows(made.block_keys(tokens[at * block_size :], expected[at - 1])) == expected[at:]


@pytest.mark.usefixtures("hardware")
@pytest.mark.parametrize("block_size", [23, 24, 255, 256, 300, 70000])
def test_heads_of_long_blocks(block_size: int) -> None:
    tokens = np.random.default_rng(block_size).integers(0, 1 << 40, 2 * block_size + 1)
    expected = vllm_hashes(tokens.tolist(), block_size, bytes.fromhex(SEED_0[0]))
    assert rows(scheme(block_size=block_size).block_keys(tokens)) == expected


@pytest.mark.parametrize("bits", [*range(4, 9), 15, 16, 17, 31, 32, 33, 62, 63])
def test_tokens_at_the_edges_of_widths(bits: int) -> None:
    tokens = [number for number in (2**bits - 2, 2**bits - 1, 2**bits, 23, 24) if number < 2**63]
    expected = vllm_hashes(tokens, len(tokens), bytes.fromhex(SEED_0[0]))
    assert rows(scheme(block_size=len(tokens)).block_keys(tokens)) == expected
    assert rows(scheme(block_size=len(tokens)).block_keys(np.array(tokens, np.uint64))) == expected


def inputs() -> st.SearchStrategy[list[tuple[str, int, int]]]:
    """Multimodal inputs one behind another, some side by side."""
    parts = st.lists(st.tuples(texts, st.sampled_from([0, 0, 1, 5, 20]), st.integers(1, 40)), max_size=5)

    def placed(parts: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        found, at = [], 0
        for text, gap, length in parts:
            found.append((text, at + gap, length))
            at += gap + length
        return found

    return parts.map(placed)


embeddings = st.one_of(
    st.none(),
    st.tuples(st.integers(1, 100), st.integers(1, 30), st.sampled_from(["f2", "f4", "u1"])).map(
        lambda form: np.random.default_rng(form[0]).integers(0, 200, form[:2]).astype(form[2])
    ),
)


@pytest.mark.parametrize("version", VERSIONS)
@given(data=st.data())
def test_extra_keys_of_every_version(version: str, data: st.DataObject) -> None:
    block_size = data.draw(st.integers(1, 20))
    tokens = data.draw(st.lists(tokens_of_any_width, max_size=90))
    lora = data.draw(st.one_of(st.none(), st.tuples(texts, texts)))
    about = {"salt": data.draw(st.one_of(st.just(""), texts)), "multimodal": data.draw(inputs())}
    about["prompt_embeds"] = data.draw(embeddings)
    ahead = data.draw(st.sampled_from([0, 0, 1, 5])) if version == "vllm" else 0
    made = scheme(version, block_size=block_size, ahead=ahead)
    expected = vllm_request(version, tokens, block_size, bytes.fromhex(SEED_0[0]), ahead, lora=lora, **about)
    about["lora"] = lora or ""
    assert rows(made.block_keys(tokens, **about)) == expected
    if expected:
        at = data.draw(st.integers(1, len(expected)))
        start = at * block_size
        assert rows(made.block_keys(tokens[start:], expected[at - 1], start=start, **about)) == expected[at:]
    sequence, found = made.sequence(**about), []
    for part in np.array_split(np.array(tokens, np.int64), data.draw(st.integers(1, 30))):
        found += rows(sequence.extend(part))
    assert found == expected == rows(sequence.keys) and sequence.num_tokens == len(tokens)


@pytest.mark.parametrize(("version", "ahead"), [*((version, 0) for version in VERSIONS), ("vllm", 1), ("vllm", 2), ("vllm", 5)])
def test_inputs_that_begin_and_end_anywhere(version: str, ahead: int) -> None:
    """Each place of two neighbours in blocks of 4: where an edge is that of a block, or of what is looked at ahead of one."""
    tokens, made, none_hash = list(range(16)), scheme(version, block_size=4, ahead=ahead), bytes.fromhex(SEED_0[0])
    for offset in range(10):
        for length in range(1, 10):
            for gap in (0, 1):
                pair = [("a", offset, length), ("b", offset + length + gap, 3)]
                expected = vllm_request(version, tokens, 4, none_hash, ahead, multimodal=pair)
                assert rows(made.block_keys(tokens, multimodal=pair)) == expected, pair
                for at in range(1, len(expected)):
                    later = made.block_keys(tokens[4 * at :], expected[at - 1], start=4 * at, multimodal=pair)
                    assert rows(later) == expected[at:], (pair, at)


def test_the_reference_has_all_kinds_of_extra_keys() -> None:
    about: dict[str, Any] = {"lora": ("sql", "/p"), "salt": "s", "multimodal": [("img", 3, 20)]}
    about["prompt_embeds"] = np.ones((20, 1), np.uint8)
    raw, digest = b"\1" * 4, hashlib.sha256(b"\1" * 4).digest()
    assert extra_keys("vllm", 16, 32, **about) == (("lora", "sql", "/p"), ("mm", "img", -13), ("prompt_embeds", digest))
    assert extra_keys("vllm-0.29", 16, 32, **about) == ("sql", ("img", -13), digest)
    assert extra_keys("vllm-0.17", 16, 32, **about) == ("sql", "img", digest)
    assert extra_keys("vllm-0.15", 16, 32, **about) == ("sql", "img", raw)
    assert extra_keys("vllm", 0, 16, salt="s") == (("cache_salt", "s"),) and extra_keys("vllm-0.15", 0, 16, salt="s") == ("s",)
    assert extra_keys("vllm", 16, 32, salt="s") is None and extra_keys("vllm", 0, 16) is None


def test_an_input_inside_another() -> None:
    """As vLLM goes through them (the sound of a video lies inside it): one that goes on ends the search, and behind the last
    one's end nothing is looked for. Up to 0.17 one that ends where a block begins still counts there, if not seen before."""
    nested = [("video", 0, 40), ("sound", 2, 30)]
    none_hash, tokens = bytes.fromhex(SEED_0[0]), list(range(48))
    for version, extras in (
        ("vllm-0.20", [(("video", 0),), (("video", -16),), None]),
        ("vllm-0.15", [("video",), ("video",), ("video", "sound")]),
    ):
        expected = vllm_hashes(tokens, 16, none_hash, extras)
        assert rows(scheme(version).block_keys(tokens, multimodal=nested)) == expected
        assert rows(scheme(version).block_keys(tokens[32:], expected[1], start=32, multimodal=nested)) == expected[2:]


@pytest.mark.parametrize("version", VERSIONS)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=4))
def test_inputs_inside_others(version: str, inputs: list[tuple[str, int, int]]) -> None:
    inputs.sort(key=lambda each: each[1])
    tokens, none_hash = list(range(32)), bytes.fromhex(SEED_0[0])
    expected = vllm_hashes(tokens, 4, none_hash, walked(version, range(0, 32, 4), 4, inputs))
    made = scheme(version, block_size=4)
    assert rows(made.block_keys(tokens, multimodal=inputs)) == expected
    for at in (1, 3, 6):
        assert rows(made.block_keys(tokens[4 * at :], expected[at - 1], start=4 * at, multimodal=inputs)) == expected[at:]


@pytest.mark.usefixtures("hardware")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 16, 20])
@pytest.mark.parametrize("width", [1, 8, 16, 33])
def test_embeddings_of_any_length(version: str, length: int, width: int) -> None:
    """Shorter than the tokens, which generated ones follow, and longer; of bytes below, at and above blocks of SHA-256."""
    embeds, tokens = np.random.default_rng(length).integers(0, 256, (length, width), np.uint8), list(range(16))
    for ahead in (0, 3) if version == "vllm" else (0,):
        expected = vllm_request(version, tokens, 4, bytes.fromhex(SEED_0[0]), ahead, prompt_embeds=embeds)
        assert rows(scheme(version, block_size=4, ahead=ahead).block_keys(tokens, prompt_embeds=embeds)) == expected


def test_a_lora_as_vllms_command_line_has_it() -> None:
    made = scheme()
    expected = rows(made.block_keys(range(16), lora=("sql", "/loras/a=b")))
    assert rows(made.block_keys(range(16), lora="sql=/loras/a=b")) == expected
    of_config = VllmKeys(Namespace(lora="sql=/loras/a=b", salt="s"), seed="0")
    assert rows(of_config.block_keys(range(16), salt="")) == expected
    assert rows(of_config.block_keys(range(16), lora="")) == rows(made.block_keys(range(16), salt="s"))
    old = scheme("vllm-0.15")
    assert rows(old.block_keys(range(16), lora="sql")) == rows(old.block_keys(range(16), lora="sql=/loras/a=b"))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_salt_with_the_name_of_a_lora(version: str) -> None:
    """docs/keys.md warns of it: they meet in the first block, and there only, before entries were tagged."""
    made = scheme(version)
    same = (made.block_keys(range(48), lora="x=p") == made.block_keys(range(48), salt="x")).all(axis=1)
    assert same.tolist() == [version != "vllm", False, False]


def test_a_block_that_two_inputs_reach_into_has_both_when_it_is_filled_by_generation() -> None:
    """docs/keys.md: as vLLM hashes a prompt, and not as it goes on after one before 0.32."""
    pair = [("a", 17, 3), ("b", 22, 4)]
    sequence = scheme("vllm-0.20").sequence(multimodal=pair)
    found = rows(sequence.extend(range(26))) + [key for token in range(26, 32) for key in rows(sequence.extend([token]))]
    extras = [None, (("a", 1), ("b", 6))]
    assert found == vllm_hashes(range(32), 16, bytes.fromhex(SEED_0[0]), extras)
    assert found != vllm_hashes(range(32), 16, bytes.fromhex(SEED_0[0]), [None, (("b", 6),)])


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"lora": "sql"}, r'lora = \'sql\': vllm hashes its name and path: pass "name=path"'),
        ({"lora": "=path"}, "lora = '=path'"),
        ({"lora": ("a", "b", "c")}, "lora = "),
        ({"lora": 3}, "lora = 3: must be a string"),
        ({"lora": ("a", None)}, "lora = None: must be a string"),
        ({"lora": "a=\udcff"}, "lora = .*UTF-8"),
        ({"salt": b"x"}, "salt = b'x': must be a string"),
        ({"salt": "\ud800"}, "salt = .*UTF-8"),
        ({"multimodal": 3}, "multimodal = 3: must be a sequence"),
        ({"multimodal": [("a", 1)]}, "multimodal = .*must be a sequence of"),
        ({"multimodal": ["abc"]}, r"multimodal\[0\].offset = 'b'"),
        ({"multimodal": [(b"a", 0, 1)]}, "identifier = b'a'"),
        ({"multimodal": [("a", -1, 1)]}, r"multimodal\[0\].offset = -1"),
        ({"multimodal": [("a", 5, 1), ("b", 4, 1)]}, r"multimodal\[1\].offset = 4: must be an integer from 5"),
        ({"multimodal": [("a", 0, 0)]}, r"multimodal\[0\].length = 0"),
        ({"multimodal": [("a", 0, 2**31 + 1)]}, r"multimodal\[0\].length = "),
        ({"prompt_embeds": [[1.0]]}, "prompt_embeds must be a NumPy array.*list"),
        ({"prompt_embeds": np.ones(3)}, r"prompt_embeds .*\(3,\)"),
        ({"prompt_embeds": np.ones((0, 3))}, r"prompt_embeds .*\(0, 3\)"),
        ({"prompt_embeds": np.array([[None]])}, "prompt_embeds .*NumPy"),
        ({"prompt_embeds": np.ma.ones((2, 2))}, "masked"),
    ],
)
def test_what_cannot_be_is_refused_by_name(about: dict[str, Any], message: str) -> None:
    for made in (scheme().block_keys, lambda _, **about: scheme().sequence(**about)):
        with pytest.raises(ArgumentError, match=message) as caught:
            made(range(16), **about)
        assert len(str(caught.value)) < 500


def test_tokens_beyond_63_bits_are_refused() -> None:
    for bad in ([-1], np.array([2**63], np.uint64)):
        with pytest.raises(ArgumentError, match="token_ids must be from 0 to 9223372036854775807; seen: "):
            scheme(block_size=1).block_keys(bad)


@pytest.mark.parametrize(
    ("parent", "start", "message"),
    [
        (None, 16, "start = 16: must be 0 without a parent"),
        (None, False, "start = False"),
        (bytes(32), np.True_, "start = "),
        (bytes(32), 0, "start = 0: must be a positive multiple of the block size 16"),
        (bytes(32), 17, "start = 17: must be a positive multiple"),
        (bytes(32), -16, "start = -16"),
        (bytes(32), 16.0, "start = 16.0"),
        (bytes(32), (1 << 31) + 16, "start = .*2..31 at most"),
        (bytes(32), 1 << 70, "start = "),
    ],
)
def test_starts_that_cannot_be(parent: bytes | None, start: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        scheme().block_keys(range(16), parent, start=start)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint64, np.int64])
def test_starts_of_any_width(kind: type[np.integer[Any]]) -> None:
    made = scheme(block_size=512)
    assert np.array_equal(made.block_keys(range(512), start=kind(0)), made.block_keys(range(512)))
    with pytest.raises(ArgumentError, match="start = .*16.*: must be a positive multiple of the block size 512"):
        made.block_keys(range(512), bytes(32), start=kind(16))


def test_places_that_matter_are_asked_for() -> None:
    for about in ({"multimodal": [MultimodalInput("a", 0, 3)]}, {"prompt_embeds": np.ones((1, 1))}):
        with pytest.raises(ArgumentError, match="start is missing"):
            scheme().block_keys(range(16), bytes(32), **about)
    with_salt = scheme().block_keys(range(16), bytes(32), salt="s")
    assert rows(with_salt) == vllm_hashes(range(16), 16, bytes(32)), "a salt is hashed in the first block only"


def test_schemes_by_name() -> None:
    namespace = Namespace(model="m")
    assert SCHEMES == _KEY_SCHEMES
    for name in SCHEMES:
        made = make_scheme(name, namespace, seed=None if name == "kvortex" else "0")
        assert made.name == name and made.block_size == 16 and made.namespace is namespace
        assert isinstance(made, KvortexKeys if name == "kvortex" else VllmKeys)
    for name in ("", "sha256", "vllm-0.33", None, ["vllm"]):
        with pytest.raises(ConfigError, match="key_scheme = .*unknown; known are kvortex, vllm, vllm-0.29"):
            make_scheme(name, namespace)  # type: ignore[arg-type]
    for unknown in ("v", ["vllm"], None, b"vllm"):
        with pytest.raises(ConfigError, match="key_scheme = .*: unknown; known of vLLM are vllm"):
            VllmKeys(namespace, unknown)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="key_seed = '0': means something for vLLM's"):
        make_scheme("kvortex", namespace, seed="0")
    with pytest.raises(ConfigError, match="lora = 'sql': vllm hashes its name and path"):
        make_scheme("vllm", Namespace(lora="sql"))
    for bad in (7, "\ud800"):
        with pytest.raises(ConfigError, match="key_seed = "):
            VllmKeys(namespace, seed=bad)  # type: ignore[arg-type]
    for ahead in (-1, 0.0, None, "", False, 1.0, 1 << 21):
        with pytest.raises(ArgumentError, match=rf"ahead = {ahead!r}: must be an integer from 0"):
            VllmKeys(namespace, ahead=ahead)  # type: ignore[arg-type]


@pytest.mark.parametrize("namespace", [None, 16, {"model": "m"}, Namespace])
def test_what_is_no_namespace(namespace: Any) -> None:
    makers = (VllmKeys, KvortexKeys, lambda it: adopt(it, [bytes(32)]), lambda it: block_keys(it, range(16)))
    for make in (*makers, *(lambda it, name=name: make_scheme(name, it) for name in ("kvortex", "vllm"))):
        with pytest.raises(ArgumentError, match="namespace = .*: must be a kvortex.keys.Namespace"):
            make(namespace)


@pytest.mark.parametrize("about", [{"lora": 5}, {"salt": b"s"}, {"lora": ("a", "b")}, {"salt": ["s"]}])
def test_what_the_scheme_kvortex_refuses_of_one_call(about: dict[str, Any]) -> None:
    made, [(name, value)] = KvortexKeys(Namespace()), about.items()
    for call in (lambda: made.block_keys(range(16), **about), lambda: made.sequence(**about), lambda: made.chain(**about)):
        with pytest.raises(ArgumentError, match=re.escape(f"{name} = {value!r}: must be str")):
            call()
