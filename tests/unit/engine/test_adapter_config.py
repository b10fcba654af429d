"""`adapter_config.json` is what every reader of adapters accepts, and has the same bytes wherever it is written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.environments import find_peft_012
from tests.unit.engine.tiny import (
    batch_loss,
    load_with_peft,
    make_engine,
    make_job,
    random_examples,
    tiny_llama,
    train,
)
from worker.trainer.exports import CONFIG

LITERAL = """\
{
  "base_model_name_or_path": "tiny/llama",
  "bias": "none",
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "lora_alpha": 32,
  "lora_dropout": 0.05,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 16,
  "revision": null,
  "target_modules": [
    "down_proj",
    "k_proj",
    "q_proj",
    "up_proj"
  ],
  "task_type": "CAUSAL_LM",
  "use_dora": false,
  "use_rslora": false
}
"""
MODULES = ("up_proj", "q_proj", "k_proj", "down_proj")
# Exports one adapter in a process of its own.
EXPORT = """
import sys
from pathlib import Path
from tests.unit.engine.tiny import make_engine, make_job
engine = make_engine()
modules = ("up_proj", "q_proj", "k_proj", "down_proj")
engine.admit(make_job("mine", rank=16, alpha=32.0, dropout=0.05, target_modules=modules))
engine.export_adapter("mine", Path(sys.argv[1]))
"""
# Loads a base and an adapter with whatever PEFT runs it, and writes the logits of a few tokens.
SCORE = """
import sys
import peft, torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = LlamaForCausalLM(LlamaConfig.from_pretrained(base))
model.load_state_dict(load_file(base + "/model.safetensors"), strict=False)
model = peft.PeftModel.from_pretrained(model, adapter).eval()
assert peft.__version__ == "0.12.0", peft.__version__
assert not any(parameter.isnan().any() for parameter in model.parameters())
with torch.no_grad():
    save_file({"logits": model(input_ids=load_file(ids)["ids"]).logits}, out)
"""


def export(directory: Path, *, use_rslora: bool = False, alpha: float = 32.0) -> dict[str, Any]:
    engine = make_engine()
    job = make_job("mine", rank=16, alpha=alpha, dropout=0.05, target_modules=MODULES, use_rslora=use_rslora)
    engine.admit(job)
    train(engine, num_fused_steps=2)
    engine.export_adapter("mine", directory)
    found: dict[str, Any] = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    return found


def test_the_file_has_the_keys_that_mean_something_sorted_and_whole_numbers_as_integers(tmp_path: Path) -> None:
    export(tmp_path)
    assert (tmp_path / CONFIG).read_text(encoding="utf-8") == LITERAL


def test_every_process_writes_the_same_bytes(tmp_path: Path) -> None:
    found = set()
    for seed in ("1", "2"):
        directory = tmp_path / seed
        directory.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", EXPORT, str(directory)], check=True, env=environment)
        found.add(hashlib.sha256((directory / CONFIG).read_bytes()).hexdigest())
    assert found == {hashlib.sha256(LITERAL.encode()).hexdigest()}


@pytest.mark.parametrize(("alpha", "literal"), [(1.0, "1"), (16.0, "16"), (9.5, "9.5")])
def test_only_a_whole_number_is_an_integer(tmp_path: Path, alpha: float, literal: str) -> None:
    export(tmp_path, alpha=alpha)
    assert f'"lora_alpha": {literal},\n' in (tmp_path / CONFIG).read_text(encoding="utf-8")


# Ollama, convert/convert.go, `AdapterParameters`: `Alpha uint32 json:"lora_alpha"`; its other fields are MLX's. The
# rest are the kinds of value that a program with a struct for PEFT's file gives these keys.
GO_KINDS: dict[str, type | tuple[type, ...]] = {
    "base_model_name_or_path": str,
    "bias": str,
    "fan_in_fan_out": bool,
    "inference_mode": bool,
    "init_lora_weights": bool,
    "lora_alpha": int,
    "lora_dropout": (int, float),
    "modules_to_save": type(None),  # a slice
    "peft_type": str,
    "r": int,
    "revision": type(None),  # a pointer
    "target_modules": list,
    "task_type": str,
    "use_dora": bool,
    "use_rslora": bool,
}


def test_a_go_program_reads_every_number_into_its_type(tmp_path: Path) -> None:
    found = export(tmp_path)
    assert found.keys() == GO_KINDS.keys()
    for name, kind in GO_KINDS.items():
        assert isinstance(found[name], kind), name
        assert kind is not int or (type(found[name]) is int and 0 <= found[name] < 2**32), name
    assert all(isinstance(module, str) for module in found["target_modules"])


def refuse_as_vllm(config: dict[str, Any], *, max_lora_rank: int) -> list[str]:
    """Return what vLLM 0.33 has against an adapter: `PEFTHelper` of vllm/lora/peft_helper.py, `validate_legal`."""
    missing = [f"{name} is missing" for name in ("r", "lora_alpha", "target_modules") if name not in config]
    rules = {
        "the rank is above max_lora_rank": config.get("r", 0) > max_lora_rank,
        "bias is not none": config.get("bias", "none") != "none",
        "modules_to_save is not supported": bool(config.get("modules_to_save")),
        "DoRA is not supported": config.get("use_dora", False),
        "lora_bias is not supported": config.get("lora_bias", False),
        "the base's weights were changed": config.get("init_lora_weights") in ("pissa", "olora", "corda", "loftq"),
        "layers are replicated": bool(config.get("layer_replication")),
        "aLoRA is not supported": bool(config.get("alora_invocation_tokens")),
    }
    return missing + [name for name, is_broken in rules.items() if is_broken]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_vllm_takes_the_file_when_its_max_lora_rank_is_enough(tmp_path: Path, *, use_rslora: bool) -> None:
    found = export(tmp_path, use_rslora=use_rslora)
    assert refuse_as_vllm(found, max_lora_rank=16) == []
    assert refuse_as_vllm(found, max_lora_rank=8) == ["the rank is above max_lora_rank"]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_012_loads_the_adapter_and_scores_as_the_newest(tmp_path: Path, *, use_rslora: bool) -> None:
    adapter, base, ids, out = (tmp_path / name for name in ("adapter", "base", "ids", "out"))
    adapter.mkdir()
    export(adapter, use_rslora=use_rslora)
    tiny_llama().save_pretrained(base)
    example = random_examples(50, 1)[0]
    save_file({"ids": torch.from_numpy(example.token_ids)[None]}, ids)
    command = [str(find_peft_012()), "-I", "-c", SCORE, *map(str, (base, adapter, ids, out))]
    subprocess.run(command, check=True)
    with torch.no_grad():
        model = load_with_peft(tiny_llama(), adapter).eval()
        expected = model(input_ids=load_file(ids)["ids"]).logits
        unadapted = tiny_llama()(input_ids=load_file(ids)["ids"]).logits
    assert torch.allclose(load_file(out)["logits"], expected, atol=1e-5)
    assert not torch.allclose(expected, unadapted, atol=1e-4)
    assert batch_loss(model, [example]).isfinite()
