"""Loads the one frozen base model: safetensors or GGUF only, never a repository's own code.

A GGUF file is converted into a safetensors directory once for each cache. Later loads, also quantised ones, start from
there. On a CPU everything computes in float32, whatever the registry says, because bfloat16 is several times slower
there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from core.domain.datasets.tokenizers import BaseTokenizer, TokenizerBundle
from core.scratch import scratch_directory
from worker.messages import LoadBase
from worker.trainer.blame import blaming
from worker.trainer.inspection import (
    SMALL_FILES,
    BaseFiles,
    check_weights,
    converted_path,
    existing,
    fetch,
    read_tokenizer,
    refuse_foreign_code,
)
from worker.trainer.tokenizers import describe_tokenizer


@dataclass(frozen=True)
class LoadedBase:
    model: Any
    tokenizer: BaseTokenizer
    bundle: TokenizerBundle
    revision: str
    seconds: float


def load_base(order: LoadBase) -> LoadedBase:
    """Load what the order names. Raises BaseRefusedError with what the operator must change, or WorkerUnfitError."""
    started = time.monotonic()
    with blaming():
        cache_dir = Path(order.cache_dir)
        directory = materialize_base(order.source_kind, order.location, cache_dir, revision=order.revision)
        refuse_foreign_code(directory)
        check_weights(directory)
        tokenizer = read_tokenizer(BaseFiles(directory), order)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=_compute_dtype(order),
            quantization_config=_quantization_config(order),
            device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    revision = order.revision or directory.name
    bundle = describe_tokenizer(tokenizer)
    return LoadedBase(model, BaseTokenizer(bundle), bundle, revision, seconds=time.monotonic() - started)


def materialize_base(source_kind: str, location: str, cache_dir: Path, *, revision: str = "") -> Path:
    """Return a local safetensors directory for a source. Converts it, or downloads it into the cache, if necessary."""
    match source_kind:
        case "path":
            return existing(Path(location))
        case "gguf":
            return _convert_gguf(existing(Path(location)), cache_dir)
        case _:
            return fetch(location, revision, patterns=("*.safetensors", *SMALL_FILES))


def _convert_gguf(gguf: Path, cache_dir: Path) -> Path:
    target = converted_path(gguf, cache_dir)
    if target.exists():
        return target
    bases_dir = target.parent
    bases_dir.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    weights = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model loaded from GGUF cannot be saved, but one built from its configuration with its weights can.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    with scratch_directory("base", bases_dir) as scratch:
        made = scratch / "base"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
        try:
            made.replace(target)
        except OSError:  # another worker on the same cache was first, with the same result
            if not target.exists():
                raise
    return target


def _compute_dtype(order: LoadBase) -> torch.dtype:
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if order.dtype == "bfloat16" else torch.float32


def _quantization_config(order: LoadBase) -> BitsAndBytesConfig | None:
    if order.quantization is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_compute_dtype(order),
    )
