"""A real base model that is small: its weights are random, its tokenizer and chat template are those of SmolLM2.

A module of its own, because it loads torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from local.binaries import find_smollm2


def write_tiny_base(directory: Path, **shape: int) -> Path:
    """A random Llama with a real tokenizer and chat template, tiny unless its `shape` says otherwise."""
    gguf = find_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    tiny: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **tiny | shape,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
