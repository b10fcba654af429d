"""The finished adapter: PEFT's files, a model card, a manifest written last, and an inspection before publication."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from core.domain.training import AdapterConfig, TrainingSpec
from core.domain.values import StoredFile
from worker.engine.errors import DivergedError
from worker.messages import CheckpointMetrics, JobFacts
from worker.trainer.cards import write_card
from worker.trainer.failures import AdapterInvalidError, NothingLearnedError

WEIGHTS, CONFIG, CARD, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "README.md", "manifest.json"
ADAPTER_FILES = (WEIGHTS, CONFIG, CARD, MANIFEST)
RESULT_FILE = "step_metrics.csv"
_VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "espalier")
# PEFT patches nn.Module for the whole process while it builds empty modules. Two threads would undo the patch in the
# wrong order, and every module made later would have no weights.
_patching = threading.Lock()
_RESULT_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True)
class Provenance:
    """The origin of the adapter, for its manifest and card."""

    facts: JobFacts
    spec: TrainingSpec
    training_sha256: str
    validation_sha256: str | None
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class ResultRow:
    """One line of the result file. Validation numbers exist at the steps that were evaluated.

    Its fields have the names of OpenAI's columns, and are stored under these names with every resume point.
    """

    step: int
    train_loss: float
    train_accuracy: float
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None


def describe_adapter(directory: Path, provenance: Provenance) -> None:
    """Write the model card and, last, the manifest with the hashes of all the other files."""
    facts = provenance.facts
    card = write_card(facts, provenance.spec, step=provenance.step, metrics=provenance.metrics)
    (directory / CARD).write_text(card, encoding="utf-8")
    files = [describe_file(directory / name).model_dump() for name in (WEIGHTS, CONFIG, CARD)]
    manifest = {
        "format": "espalier-adapter-1",
        "job_id": facts.job_id,
        "tenant": facts.tenant,
        "model": facts.model_name,
        "base_model": facts.base_model_id,
        "base_revision": facts.base_revision,
        "base_license": facts.base_license,
        "quantization": facts.quantization,
        "step": provenance.step,
        "training_file_sha256": provenance.training_sha256,
        "validation_file_sha256": provenance.validation_sha256,
        "hyperparameters": provenance.spec.model_dump(mode="json"),
        "metrics": provenance.metrics,
        "versions": {name: version(name) for name in _VERSIONED},
        "files": files,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def verify_adapter(
    directory: Path, *, adapter: AdapterConfig, base_model_id: str, base_config: PreTrainedConfig
) -> None:
    """Inspect an adapter as its reader will. Raises AdapterInvalidError, which says what is wrong.

    Raises DivergedError or NothingLearnedError if every attempt would end the same, because training is deterministic.
    """
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    for described in map(StoredFile.model_validate, manifest["files"]):
        if describe_file(directory / described.name) != described:
            raise AdapterInvalidError(f"{described.name} is not what the manifest says.")
    config = PeftConfig.from_pretrained(str(directory))
    expected = (base_model_id, adapter.rank, adapter.alpha, adapter.use_rslora)
    if (config.base_model_name_or_path, config.r, config.lora_alpha, config.use_rslora) != expected:
        raise AdapterInvalidError("adapter_config.json does not say what was trained.")
    _verify_weights(load_file(directory / WEIGHTS), adapter)
    _load_with_peft(directory, config, base_config)


def metrics_of(row: ResultRow) -> CheckpointMetrics:
    """Return a row's numbers as a checkpoint shows them."""
    return CheckpointMetrics(
        step=row.step,
        train_loss=row.train_loss,
        train_accuracy=row.train_accuracy,
        valid_loss=row.valid_loss,
        valid_mean_token_accuracy=row.valid_mean_token_accuracy,
    )


def write_result_csv(path: Path, rows: Iterable[ResultRow]) -> None:
    """Write step metrics in the columns of OpenAI's result file."""
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_RESULT_COLUMNS)
        for row in rows:
            values = (getattr(row, column) for column in _RESULT_COLUMNS)
            writer.writerow("" if value is None else value for value in values)


def describe_file(path: Path) -> StoredFile:
    """Return a file's name, size and hash in the form of manifests."""
    content = path.read_bytes()
    return StoredFile(name=path.name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _verify_weights(tensors: dict[str, torch.Tensor], adapter: AdapterConfig) -> None:
    names = sorted(tensors)
    a_names = [name for name in names if name.endswith(".lora_A.weight")]
    b_names = [name for name in names if name.endswith(".lora_B.weight")]
    if not a_names or len(a_names) + len(b_names) != len(names) or len(a_names) != len(b_names):
        raise AdapterInvalidError("The adapter's tensors are not pairs of lora_A and lora_B.")
    if not all(name.startswith("base_model.model.") for name in names):
        raise AdapterInvalidError("A tensor's name does not start with base_model.model.")
    if {name.split(".")[-3] for name in names} != set(adapter.target_modules):
        raise AdapterInvalidError("The adapter's modules are not the target modules.")
    if any(tensors[name].shape[0] != adapter.rank for name in a_names):
        raise AdapterInvalidError("A lora_A has another rank than the adapter.")
    if any(tensors[name].shape[1] != adapter.rank for name in b_names):
        raise AdapterInvalidError("A lora_B has another rank than the adapter.")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise DivergedError("The adapter has numbers that are not finite. Lower the learning rate.")
    if not any(bool(tensors[name].any()) for name in b_names):
        raise NothingLearnedError("Every lora_B is zero: nothing was learned. Raise the learning rate.")


def _load_with_peft(directory: Path, config: PeftConfig, base_config: PreTrainedConfig) -> None:
    """Let PEFT load the adapter onto the base's skeleton, which has all modules but no weights."""
    dense_config = copy.deepcopy(base_config)
    if hasattr(dense_config, "quantization_config"):
        del dense_config.quantization_config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(dense_config)
    with _patching:
        model = PeftModel(skeleton, config, low_cpu_mem_usage=True)
        try:
            loaded = model.load_adapter(str(directory), "inspected", low_cpu_mem_usage=True, torch_device="cpu")
        except RuntimeError as error:
            raise AdapterInvalidError("A tensor of the adapter has not the shape that PEFT expects.") from error
    missing = [name for name in loaded.missing_keys if ".inspected." in name]
    if missing or loaded.unexpected_keys:
        strange = ", ".join([*missing, *loaded.unexpected_keys][:3])
        raise AdapterInvalidError(f"PEFT misses tensors of the adapter, or does not know them: {strange}.")
