"""Fields of a request that are in the wrong place or have another library's name, and where they belong here.

A field in the wrong place is found by its own name. The table holds only the names that others use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

# Names of PEFT, transformers, TRL, Axolotl, LLaMA-Factory and other services, and the names here.
OTHER_NAMES = {
    "lora": "adapter",
    "lora_config": "adapter",
    "peft_config": "adapter",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "modules": "target_modules",
    "rslora": "use_rslora",
    "epochs": "n_epochs",
    "num_epochs": "n_epochs",
    "num_train_epochs": "n_epochs",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "lr": "learning_rate",
    "lr_multiplier": "learning_rate_multiplier",
    "lr_scheduler": "learning_rate_schedule",
    "lr_scheduler_type": "learning_rate_schedule",
    "learning_rate_scheduler": "learning_rate_schedule",
    "warmup": "warmup_ratio",
    "grad_clip": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "max_length": "max_seq_len",
    "max_seq_length": "max_seq_len",
    "seq_len": "max_seq_len",
    "sequence_len": "max_seq_len",
    "cutoff_len": "max_seq_len",
    "context_length": "max_seq_len",
    "load_in_4bit": "quantization",
    "quantize": "quantization",
    "base_model": "model",
    "model_name": "model",
    "dataset": "training_file",
    "train_file": "training_file",
    "training_file_id": "training_file",
    "eval_file": "validation_file",
    "validation_file_id": "validation_file",
    "random_seed": "seed",
}


def find_misplaced(body: Mapping[str, Any], schema: type[BaseModel]) -> tuple[str, str] | None:
    """Return the dotted name of the first field that belongs elsewhere, as it was sent, and its name here."""
    for sent in _iterate_unknown(body, schema):
        name = sent.rpartition(".")[2]
        right = _places(schema).get(OTHER_NAMES.get(name, name))
        if right is not None:
            return sent, right
    return None


def _iterate_unknown(body: Mapping[str, Any], schema: type[BaseModel]) -> Iterator[str]:
    for name, value in body.items():
        if name not in schema.model_fields:
            yield name
        elif (inner := _schema_of(schema, name)) is not None and isinstance(value, Mapping):
            yield from (f"{name}.{unknown}" for unknown in _iterate_unknown(value, inner))


@cache
def _places(schema: type[BaseModel]) -> dict[str, str]:
    """Return the place of every field by its own name. If there are several places, the first counts."""
    places: dict[str, str] = {}
    for path in _iterate_fields(schema):
        places.setdefault(path.rpartition(".")[2], path)
    return places


def _iterate_fields(schema: type[BaseModel]) -> Iterator[str]:
    for name in schema.model_fields:
        if (inner := _schema_of(schema, name)) is not None:
            yield from (f"{name}.{field}" for field in _iterate_fields(inner))
        yield name


def _schema_of(schema: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = schema.model_fields[name].annotation
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
