"""An adapter is published only if plain PEFT loads it and it states what was trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core.domain.training import AdapterConfig
from tests.unit.engine.tiny import make_engine, make_job, tiny_llama, train
from worker.engine.errors import EngineError
from worker.messages import JobFacts
from worker.trainer.exports import CARD, CONFIG, MANIFEST, WEIGHTS, Provenance, describe_adapter, verify_adapter
from worker.trainer.failures import AdapterInvalidError, TrainerError

JOB = make_job("mine", rank=6, target_modules=("q_proj", "up_proj"))
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    engine = make_engine()
    engine.admit(JOB)
    train(engine, num_fused_steps=2)
    engine.export_adapter("mine", tmp_path)
    return tmp_path


def describe(directory: Path) -> None:
    facts = JobFacts(
        job_id="ftjob-1",
        tenant="acme",
        model_name="ft:tiny:acme::1",
        base_model_id="tiny/llama",
        base_revision="1",
        quantization=None,
        created_at=0,
        base_license="apache-2.0",
    )
    describe_adapter(directory, Provenance(facts, JOB.spec, "0" * 64, None, step=2, metrics={"train_loss": 1.0}))


def verify(directory: Path, *, adapter: AdapterConfig = JOB.spec.adapter) -> None:
    verify_adapter(directory, adapter=adapter, base_model_id="tiny/llama", base_config=tiny_llama().config)


def test_what_the_engine_exports_passes(adapter_dir: Path) -> None:
    describe(adapter_dir)
    verify(adapter_dir)


def test_the_manifest_names_the_bases_licence_and_the_cards_hash(adapter_dir: Path) -> None:
    describe(adapter_dir)
    manifest = json.loads((adapter_dir / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["base_license"] == "apache-2.0"
    card = (adapter_dir / CARD).read_bytes()
    assert hashlib.sha256(card).hexdigest() in {file["sha256"] for file in manifest["files"]}
    assert b"license: apache-2.0\n" in card


def test_adapters_inspected_at_once_leave_no_module_without_weights(adapter_dir: Path) -> None:
    describe(adapter_dir)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(verify, adapter_dir) for _ in range(12)]:
            done.result()
    assert nn.Linear(1, 1).weight.device.type == "cpu"


def rename(tensors: Tensors) -> None:
    for matrix in "AB":
        name = FIRST.replace("lora_A", f"lora_{matrix}")
        tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)


def misshape(tensors: Tensors) -> None:
    tensors[FIRST] = tensors[FIRST][:, :10].clone()


def unlearn(tensors: Tensors) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def poison(tensors: Tensors) -> None:
    tensors[FIRST][0, 0] = torch.nan


def lose(tensors: Tensors) -> None:
    del tensors[FIRST]


def shrink(tensors: Tensors) -> None:
    tensors[FIRST] = tensors[FIRST][:3].clone()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (rename, "PEFT misses tensors"),
        (misshape, "shape that PEFT expects"),
        (lose, "not pairs"),
        (shrink, "another rank"),
    ],
)
def test_weights_that_a_reader_would_stumble_over_do_not_leave(
    adapter_dir: Path, change: Callable[[Tensors], None], complaint: str
) -> None:
    tensors = load_file(adapter_dir / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter_dir / WEIGHTS)
    describe(adapter_dir)
    with pytest.raises(AdapterInvalidError, match=complaint):
        verify(adapter_dir)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [(unlearn, "nothing_learned", "Raise the learning rate"), (poison, "diverged", "Lower the learning rate")],
)
def test_what_another_attempt_cannot_mend_is_the_jobs_own_fault_and_says_what_to_change(
    adapter_dir: Path, change: Callable[[Tensors], None], code: str, words: str
) -> None:
    tensors = load_file(adapter_dir / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter_dir / WEIGHTS)
    describe(adapter_dir)
    with pytest.raises((TrainerError, EngineError), match=words) as failed:
        verify(adapter_dir)
    assert isinstance(failed.value, TrainerError | EngineError)
    assert (failed.value.code, failed.value.is_job_fault) == (code, True)


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 3.0}, {"r": 5}, {"use_rslora": True}, {"base_model_name_or_path": "/a/path"}]
)
def test_a_configuration_that_says_something_else_does_not_leave(adapter_dir: Path, change: dict[str, Any]) -> None:
    path = adapter_dir / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    describe(adapter_dir)
    with pytest.raises(AdapterInvalidError, match="does not say what was trained"):
        verify(adapter_dir)


def test_a_file_that_changed_after_it_was_described_does_not_leave(adapter_dir: Path) -> None:
    describe(adapter_dir)
    with (adapter_dir / CONFIG).open("a") as config:
        config.write("\n")
    with pytest.raises(AdapterInvalidError, match="not what the manifest says") as failed:
        verify(adapter_dir)
    assert not failed.value.is_job_fault  # a disk's fault, most likely: another attempt mends it
