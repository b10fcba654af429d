"""Loads the one frozen base model: safetensors or GGUF only, never a repository's own code.

A GGUF file is turned into a safetensors directory once per cache; later loads, and quantised ones, start from there.
On a CPU everything computes in float32, whatever the registry says: bfloat16 products are several times slower there.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from core.domain.datasets.tokenizers import BaseTokenizer, TokenizerBundle
from worker.messages import LoadBase
from worker.trainer.failures import BaseRefusedError
from worker.trainer.tokenizers import describe_tokenizer

_HASH_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class LoadedBase:
    model: Any
    tokenizer: BaseTokenizer
    bundle: TokenizerBundle
    revision: str
    seconds: float


def load_base(order: LoadBase) -> LoadedBase:
    """Load what the order names. Raises BaseRefusedError with what the operator must change."""
    started = time.monotonic()
    directory = materialize_base(order.source_kind, order.location, Path(order.cache_dir), revision=order.revision)
    _refuse_foreign_code(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if order.chat_template is not None:
        tokenizer.chat_template = order.chat_template
    if not tokenizer.chat_template:
        raise BaseRefusedError(f"{order.base_model_id} has no chat template: give one in the registry.")
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=_compute_dtype(order),
        quantization_config=_quantization_config(order),
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    _check_target_modules(model, order)
    revision = order.revision or directory.name
    bundle = describe_tokenizer(tokenizer)
    return LoadedBase(model, BaseTokenizer(bundle), bundle, revision, seconds=time.monotonic() - started)


def materialize_base(source_kind: str, location: str, cache_dir: Path, *, revision: str = "") -> Path:
    """Return a local safetensors directory for a source, converting or fetching it into the cache if need be."""
    match source_kind:
        case "path":
            return _existing(Path(location))
        case "gguf":
            return _convert_gguf(_existing(Path(location)), cache_dir / "bases")
        case _:
            return _fetch(location, revision)


def _convert_gguf(gguf: Path, bases_dir: Path) -> Path:
    target = bases_dir / f"gguf-{_hash_file(gguf)[:16]}"
    if target.exists():
        return target
    bases_dir.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    weights = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model loaded from GGUF refuses to be saved; one built from its configuration with its weights does not.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    with tempfile.TemporaryDirectory(dir=bases_dir, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "base"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
        try:
            made.replace(target)
        except OSError:  # another worker on the same cache was first; its result is the same
            if not target.exists():
                raise
    return target


def _fetch(repository: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (only where a hub is used)

    if not revision:
        raise BaseRefusedError(f"{repository} comes from a hub: pin its revision (a commit hash) in the registry.")
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise BaseRefusedError(f"There is no base model at {path}; mend the registry's location.")
    return path


def _refuse_foreign_code(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in config:
        raise BaseRefusedError("The base model's config names code of its own (auto_map), which is never run.")
    if not any(directory.glob("*.safetensors")):
        raise BaseRefusedError("The base model has no safetensors files; convert it first.")


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


def _check_target_modules(model: torch.nn.Module, order: LoadBase) -> None:
    has = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()  # type: ignore[operator]
    }
    lacking = sorted(set(order.target_modules) - has)
    if lacking:
        raise BaseRefusedError(
            f"The registry lists target_modules {', '.join(lacking)}, which {order.base_model_id} lacks; "
            f"it has {', '.join(sorted(has))}."
        )


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
