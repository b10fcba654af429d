"""Base models as an operator's registry defines them: their types, the linears that adapters may train, their state."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from core.domain import bounds
from core.domain.training import Quantization
from core.domain.values import Frozen


class BaseState(StrEnum):
    """Whether a base can be trained on.

    - `unchecked`: No worker has found out yet, so it may prove to be either.
    - `usable`: A worker has loaded it.
    - `unusable`: A worker has found that it cannot be loaded.
    """

    UNCHECKED = "unchecked"
    USABLE = "usable"
    UNUSABLE = "unusable"


# A licence's name: the hub's identifiers, such as apache-2.0, and SPDX expressions.
LICENSE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 .+()_-]{0,127}$"

_LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The decoders that can be fused, by the `model_type` of their config, with the linears of their layers. Their attention
# goes through transformers' attention interface with plain causal (or sliding) masks, and their logits are the head's
# output unchanged.
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


class BaseModelSource(Frozen):
    """Where the weights are: a local directory, a GGUF file, or a Hugging Face repository at a pinned commit."""

    kind: Literal["path", "gguf", "hub"]
    location: str
    revision: str = ""


class BaseModelEntry(Frozen):
    """One entry of the registry. `target_modules` are all linears that an adapter may be trained on."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")
    source: BaseModelSource
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantizations: tuple[Quantization, ...] = ()
    target_modules: tuple[str, ...] = Field(min_length=1)
    max_seq_len: Annotated[int, bounds.SEQ_LEN.field]
    max_rank: Annotated[int, bounds.RANK.field] = 64
    slots: Annotated[int, bounds.SLOTS.field] = 8
    max_tokens_per_step: Annotated[int, bounds.TOKENS_PER_STEP.field] = 4096
    chat_template: str | None = None
    license: str | None = Field(default=None, pattern=LICENSE_PATTERN)


class Registry(Frozen):
    base_models: tuple[BaseModelEntry, ...]
