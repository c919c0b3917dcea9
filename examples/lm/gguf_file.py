"""A model and its tokenizer out of a GGUF file, by the libraries gguf and tokenizers (the extra ``examples``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from examples.lm.attention import Floats
from examples.lm.model import Model, Shape
from examples.lm.workers import Workers

CONTROL = 3  # type of a token in GGUF: one that no text is made into
KINDS = (("llama", "gpt2", "smollm"), ("qwen2", "gpt2", "qwen2"))  # architecture, kind of tokenizer, how it splits text
# How Qwen2's tokenizer splits text; from tokenizer.json of Qwen/Qwen2.5-0.5B.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class UnsupportedModelError(ValueError):
    """The file's model or tokenizer is of a kind that this example does not know."""


class Chat:
    """A tokenizer, and how turns of a chat are written (ChatML).

    Attributes
    ----------
    end
        The token that ends a turn.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        names, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        self._tokenizer = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=merges))
        if fields["tokenizer.ggml.pre"] == "qwen2":
            self._tokenizer.normalizer = normalizers.NFC()
            first = pre_tokenizers.Split(Regex(QWEN2), "isolated")
            pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        else:
            first, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, pieces])
        self._tokenizer.decoder = decoders.ByteLevel()
        control = [name for name, kind in zip(names, kinds, strict=True) if kind == CONTROL]
        self._tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
        self.end = int(fields["tokenizer.ggml.eos_token_id"])

    def turn(self, role: str, text: str) -> list[int]:
        """One whole turn."""
        return self.encode(f"<|im_start|>{role}\n{text}<|im_end|>\n")

    def opening(self) -> list[int]:
        """What stands before the model's own turn."""
        return self.encode("<|im_start|>assistant\n")

    def closing(self) -> list[int]:
        """What stands behind it."""
        return self.encode("<|im_end|>\n")

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, those of ChatML included."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: list[int]) -> str:
        """Their text."""
        return str(self._tokenizer.decode(tokens))


def read_gguf(path: Path, workers: Workers | None = None) -> tuple[Model, Chat]:
    """A model of the llama or Qwen2 family with its weights in float32, and its tokenizer."""
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields["general.architecture"], fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind not in KINDS:
        raise UnsupportedModelError(f"{path.name} is of {kind}; this example reads {', '.join(map(str, KINDS))}")
    shape = _shape(fields)
    tensors = {tensor.name: _floats(tensor) for tensor in reader.tensors}
    for name, heads in (("attn_q", shape.heads), ("attn_k", shape.kv_heads)) if kind == KINDS[0] else ():
        for at in range(shape.layers):
            key = f"blk.{at}.{name}.weight"
            tensors[key] = _halves(tensors[key], heads)
    return Model(shape, tensors, workers), Chat(fields)


def _shape(fields: dict[str, Any]) -> Shape:
    def of(name: str) -> Any:
        return fields[f"{fields['general.architecture']}.{name}"]

    return Shape(
        layers=of("block_count"),
        width=of("embedding_length"),
        heads=of("attention.head_count"),
        kv_heads=of("attention.head_count_kv"),
        head_dim=of("embedding_length") // of("attention.head_count"),
        ffn=of("feed_forward_length"),
        vocabulary=len(fields["tokenizer.ggml.tokens"]),
        rope_base=of("rope.freq_base"),
        epsilon=of("attention.layer_norm_rms_epsilon"),
        context=of("context_length"),
    )


def _floats(tensor: Any) -> Floats:
    size = [int(length) for length in tensor.shape][::-1]
    return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(size)


def _halves(weight: Floats, heads: int) -> Floats:
    """Undoes the order that GGUF keeps rotary pairs in, neighbours, for halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
