"""Looks at a base's files before its weights are read, so that a refusal takes seconds instead of minutes.

The model is built from shapes alone, so a look needs almost no memory and no device.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from core.domain.datasets.tokenizers import BaseTokenizer, RenderingError
from core.domain.datasets.tokens import ConversationTokenizer
from worker.engine import inspect_base
from worker.messages import LoadBase
from worker.trainer.blame import blaming
from worker.trainer.failures import BaseRefusedError
from worker.trainer.tokenizers import describe_tokenizer

_INDEX = "model.safetensors.index.json"
# The files of a hub's repository to download, all except the weights.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class BaseFiles:
    """The path from which transformers loads a base: a directory, or one GGUF file in it."""

    directory: Path
    gguf_file: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def inspect_files(order: LoadBase) -> Any:
    """Return the base's tokenizer. Raises BaseRefusedError with what the operator must change, or WorkerUnfitError."""
    with blaming():
        files = _find_files(order)
        if files.gguf_file is None:
            refuse_foreign_code(files.directory)
        if order.source_kind == "path":
            check_weights(files.directory)
        tokenizer = read_tokenizer(files, order)
        _check_chat_template(tokenizer)
        model = _build_of_shapes(files)
        inspect_base(model)
        _check_target_modules(model, order)
    return tokenizer


def existing(path: Path) -> Path:
    if not path.exists():
        raise BaseRefusedError(f"There is no base model at {path}.")
    return path


def converted_path(gguf: Path, cache_dir: Path) -> Path:
    """Return the path of a GGUF file's safetensors directory, which may not exist yet."""
    with gguf.open("rb") as content:
        return cache_dir / "bases" / f"gguf-{hashlib.file_digest(content, 'sha256').hexdigest()[:16]}"


def fetch(repository: str, revision: str, *, patterns: tuple[str, ...]) -> Path:
    """Return the directory of a hub's repository, with the files that match the patterns."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (only where a hub is used)

    if not revision:
        raise BaseRefusedError(f"{repository} comes from a hub: pin its revision (a commit hash).")
    return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


def refuse_foreign_code(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in config:
        raise BaseRefusedError("The base model's config names code of its own (auto_map), which is never run.")


def check_weights(directory: Path) -> None:
    """Open every file of weights. A file that is missing, truncated or unreadable raises an error with its name."""
    index = directory / _INDEX
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {path.name for path in directory.glob("*.safetensors")}
    if not names:
        raise BaseRefusedError("The base model has no safetensors files; convert it first.")
    for name in sorted(names):
        # A plain open says why a file cannot be read; safe_open would call it missing.
        with (directory / name).open("rb"), safe_open(directory / name, framework="pt"):
            pass


def read_tokenizer(files: BaseFiles, order: LoadBase) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(files.directory, trust_remote_code=False, **files.options)
    if order.chat_template is not None:
        tokenizer.chat_template = order.chat_template
    if not tokenizer.chat_template:
        raise BaseRefusedError(f"{order.base_model_id} has no chat template: give one in the registry.")
    return tokenizer


def _check_chat_template(tokenizer: Any) -> None:
    """Refuse a base whose template leaves the end of an answer unlearnt: its adapters would never stop writing."""
    try:
        ConversationTokenizer(BaseTokenizer(describe_tokenizer(tokenizer))).check_template()
    except RenderingError as error:
        raise BaseRefusedError(str(error)) from error


def _find_files(order: LoadBase) -> BaseFiles:
    match order.source_kind:
        case "path":
            return BaseFiles(existing(Path(order.location)))
        case "gguf":
            file = existing(Path(order.location))
            converted = converted_path(file, Path(order.cache_dir))
            return BaseFiles(converted) if converted.exists() else BaseFiles(file.parent, file.name)
        case _:
            return BaseFiles(fetch(order.location, order.revision, patterns=SMALL_FILES))


def _build_of_shapes(files: BaseFiles) -> Any:
    config = AutoConfig.from_pretrained(files.directory, trust_remote_code=False, **files.options)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check_target_modules(model: Any, order: LoadBase) -> None:
    has = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    lacking = sorted(set(order.target_modules) - has)
    if lacking:
        raise BaseRefusedError(
            f"The registry lists target_modules {', '.join(lacking)}, which {order.base_model_id} lacks; "
            f"it has {', '.join(sorted(has))}."
        )
