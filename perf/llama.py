"""A small Llama in NumPy with its K and V in plain sight: weights from a GGUF file, float32, K and V rounded to bf16.

K is as vLLM caches it: after RoPE, in rotate-half order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.lm.download import WeightsError, fetch_weights
from kvortex.errors import ArgumentError
from kvortex.kernels.cache import cache_folder

Floats = npt.NDArray[np.float32]
Cache = list[tuple[Floats, Floats]]  # K and V of each layer, (tokens, heads, head_dim)


def weights() -> Path:
    """The file of ``examples.lm.download``, fetched once and kept in the cache folder."""
    try:
        return fetch_weights(cache_folder() / "weights")
    except WeightsError as error:
        raise ArgumentError(str(error)) from error


def bf16(numbers: Floats) -> Floats:
    """Rounded to the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).view(np.float32)


class Llama:
    """A model and its tokenizer; needs the packages ``gguf`` and ``tokenizers``, of the extra ``examples``."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
            from gguf.quants import dequantize
            from tokenizers import Tokenizer, models, pre_tokenizers
        except ImportError as error:
            raise ArgumentError(f"a model needs gguf and tokenizers, of the extra examples: {error}") from None
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        self.layers, self.heads = fields["llama.block_count"], fields["llama.attention.head_count"]
        self.kv_heads, self.width = fields["llama.attention.head_count_kv"], fields["llama.embedding_length"]
        self.dim = self.width // self.heads
        self._epsilon = fields["llama.attention.layer_norm_rms_epsilon"]
        self._turns = fields["llama.rope.freq_base"] ** (-np.arange(0, self.dim, 2) / self.dim)
        self._weights: dict[str, Floats] = {}
        for tensor in reader.tensors:
            shape = [int(n) for n in tensor.shape][::-1]
            self._weights[tensor.name] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        for layer in range(self.layers):
            for name, heads in (("attn_q", self.heads), ("attn_k", self.kv_heads)):
                self._rotate_half(f"blk.{layer}.{name}.weight", heads)
        vocabulary = {token: at for at, token in enumerate(fields["tokenizer.ggml.tokens"])}
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        self._tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])

    def _rotate_half(self, name: str, heads: int) -> None:
        """Undoes the interleaved order of RoPE in which GGUF files keep a Llama's Q and K."""
        matrix = self._weights[name]
        split = matrix.reshape(heads, self.dim // 2, 2, -1)
        self._weights[name] = np.ascontiguousarray(split.swapaxes(1, 2).reshape(matrix.shape))

    def tokens(self, text: str) -> npt.NDArray[np.int64]:
        """Ids of a text."""
        return np.array(self._tokenizer.encode(text).ids)

    def forward(self, ids: npt.NDArray[np.int64], past: Cache | None = None, *, scores: bool = True) -> tuple[Any, Cache]:
        """Logits of every token (None without ``scores``), and the K and V of these tokens."""
        w, count = self._weights, len(ids)
        begin = 0 if past is None else len(past[0][0])
        at = np.arange(begin, begin + count)
        mask = np.where(np.arange(begin + count) <= at[:, None], 0, -np.inf).astype(np.float32)
        x, kept = w["token_embd.weight"][ids], []
        for layer in range(self.layers):
            name = f"blk.{layer}."
            h = self._norm(x, w[name + "attn_norm.weight"])
            q, k, v = ((h @ w[f"{name}attn_{part}.weight"].T).reshape(count, -1, self.dim) for part in "qkv")
            q, k, v = self._rope(q, at), bf16(self._rope(k, at)), bf16(v)
            kept.append((k, v))
            if past is not None:
                k, v = np.concatenate((past[layer][0], k)), np.concatenate((past[layer][1], v))
            x = x + self._attention(q, k, v, mask).reshape(count, -1) @ w[name + "attn_output.weight"].T
            h = self._norm(x, w[name + "ffn_norm.weight"])
            gate = h @ w[name + "ffn_gate.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w[name + "ffn_up.weight"].T)) @ w[name + "ffn_down.weight"].T
        if not scores:
            return None, kept
        return self._norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T, kept

    def _norm(self, x: Floats, gain: Floats) -> Floats:
        return np.asarray(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + self._epsilon) * gain, np.float32)

    def _rope(self, x: Floats, at: npt.NDArray[np.int64]) -> Floats:
        angle = at[:, None] * self._turns
        c, s = np.cos(angle).astype(np.float32)[:, None], np.sin(angle).astype(np.float32)[:, None]
        a, b = np.split(x, 2, -1)
        return np.concatenate((a * c - b * s, b * c + a * s), -1)

    def _attention(self, q: Floats, k: Floats, v: Floats, mask: Floats) -> Floats:
        out = np.empty_like(q)
        for head in range(self.heads):
            own = head * self.kv_heads // self.heads
            scores = q[:, head] @ k[:, own].T / np.float32(np.sqrt(self.dim)) + mask
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = shares / shares.sum(-1, keepdims=True) @ v[:, own]
        return out
