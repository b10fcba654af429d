"""Base models as an operator's registry knows them: their types, what an adapter may be put on, and their state."""

from __future__ import annotations

from enum import StrEnum


class BaseState(StrEnum):
    """Whether a base can be trained on. Nobody has loaded one that is unchecked, so it may yet prove to be either."""

    UNCHECKED = "unchecked"
    USABLE = "usable"
    UNUSABLE = "unusable"


# A licence's name: the hub's identifiers, such as apache-2.0, and SPDX expressions.
LICENSE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 .+()_-]{0,127}$"

_LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The decoders that can be fused, by the `model_type` of their config, and the linears of their layers: attention that
# goes through transformers' attention interface with plain causal (or sliding) masks, logits that are the head's output
# as it is.
LINEARS_BY_MODEL_TYPE = {
    "llama": _LLAMA_LINEARS,
    "mistral": _LLAMA_LINEARS,
    "qwen2": _LLAMA_LINEARS,
    "qwen3": _LLAMA_LINEARS,
    "gemma": _LLAMA_LINEARS,
    "smollm3": _LLAMA_LINEARS,
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}
