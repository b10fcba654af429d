"""Reads and writes PEFT's file format. Only this file uses PEFT's names for LoRA's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from core.domain.training import AdapterConfig
from worker.engine.errors import InvalidJobError
from worker.engine.rows import AdapterRow

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."


def export_adapter(row: AdapterRow, directory: Path, *, base_model_id: str) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT and vLLM read them."""
    tensors = {}
    # The row leaves the device as one piece. A matrix copied by itself is strided, and would need memory there first.
    for name, pair in row.view(row.weights_P.cpu()).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pair.A_RK.clone(memory_format=torch.contiguous_format)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.B_NR.clone(memory_format=torch.contiguous_format)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config = describe_lora(row.adapter, base_model_id=base_model_id)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def describe_lora(adapter: AdapterConfig, *, base_model_id: str) -> dict[str, Any]:
    """Return the keys of PEFT's configuration that matter to a reader.

    PEFT's own writer adds about 25 more, most of them null. PEFT 0.12 refuses keys that it does not know. In PEFT's own
    file the order of the target modules changes with every process, and so does the file's hash.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_id,
        # PEFT's `AutoPeftModel` would look this revision up in the hub's repository of the name above. That name is
        # our registry's and need not be the repository that the commit is from. The manifest and the card name it.
        "revision": None,
        "r": adapter.rank,
        "lora_alpha": _as_integer(adapter.alpha),
        "lora_dropout": _as_integer(adapter.dropout),
        "target_modules": sorted(adapter.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": adapter.use_rslora,
        "use_dora": False,
        "modules_to_save": None,
    }


def _as_integer(number: float) -> float:
    """Return a whole number as an integer: Ollama reads this field as `uint32`, which does not accept `32.0`."""
    return int(number) if number.is_integer() else number


def import_adapter(row: AdapterRow, directory: Path) -> None:
    """Take all weights from PEFT's files, or none. Raises InvalidJobError when they are of another kind of adapter."""
    _check_scale(row, directory)
    tensors = load_file(directory / WEIGHTS_FILE)
    views, weights_P = {}, torch.zeros(row.bank.layout.num_parameters)
    for name, pair in row.view(weights_P).items():
        views[f"{_PREFIX}{name}.lora_A.weight"] = pair.A_RK
        views[f"{_PREFIX}{name}.lora_B.weight"] = pair.B_NR
    if tensors.keys() != views.keys():
        raise InvalidJobError("The adapter's modules are not those of this job.")
    for name, view in views.items():
        if tensors[name].shape != view.shape:
            raise InvalidJobError(f"{name} is {tuple(tensors[name].shape)}, not {tuple(view.shape)}.")
    for name, view in views.items():
        view.copy_(tensors[name])
    row.weights_P.copy_(weights_P)
    row.forget_moments()


def _check_scale(row: AdapterRow, directory: Path) -> None:
    """Refuse weights that were trained at another scale: their effect is scale times B times A."""
    trained = LoraConfig.from_pretrained(str(directory))
    wanted = (row.adapter.rank, row.adapter.alpha, row.adapter.use_rslora)
    found = (trained.r, trained.lora_alpha, trained.use_rslora)
    if found != wanted:
        raise InvalidJobError(f"The adapter's rank, alpha and rsLoRA are {found}, not this job's {wanted}.")
