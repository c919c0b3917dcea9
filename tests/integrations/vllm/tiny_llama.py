"""A Llama of 853,000 random parameters whose next token depends on what is in its KV cache: ``python tiny_llama.py FOLDER``.

Weights of vLLM's own ``load_format="dummy"`` are so small that all tokens are equally likely, whatever the cache holds.
Needs torch and safetensors, which vLLM brings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD, VOCABULARY = 128, 256, 4, 4, 2, 32, 1024
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=WIDTH, intermediate_size=INNER,
    num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD, vocab_size=VOCABULARY,
    max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=False,
    torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2, initializer_range=0.02, attention_bias=False, mlp_bias=False,
)  # fmt: skip


def write(folder: Path) -> None:
    """The model's two files."""
    import safetensors.torch
    import torch

    seed = torch.Generator().manual_seed(1)

    def weight(*shape: int, std: float = 0.15) -> torch.Tensor:
        return (torch.randn(*shape, generator=seed) * std).to(torch.bfloat16)

    one = torch.ones(WIDTH, dtype=torch.bfloat16)
    state = {
        "model.embed_tokens.weight": weight(VOCABULARY, WIDTH, std=1.0),
        "lm_head.weight": weight(VOCABULARY, WIDTH, std=0.3),
        "model.norm.weight": one.clone(),
    }
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, WIDTH), "self_attn.k_proj": (KV_HEADS * HEAD, WIDTH),
        "self_attn.v_proj": (KV_HEADS * HEAD, WIDTH), "self_attn.o_proj": (WIDTH, HEADS * HEAD),
        "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER),
    }  # fmt: skip
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            state[f"model.layers.{layer}.{name}.weight"] = weight(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{layer}.{name}.weight"] = one.clone()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    write(Path(sys.argv[1]))
