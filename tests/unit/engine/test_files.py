"""What a slot writes and reads: PEFT's adapter format, and the state that training resumes from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.history import unpack
from tests.unit.engine.tiny import (
    ALL_MODULES,
    batch_loss,
    evaluate,
    load_with_peft,
    make_engine,
    make_job,
    random_examples,
    relative_difference,
    tiny_llama,
    train,
    weights_of,
)
from worker.engine import CURSOR_FILE, Engine, InvalidJobError, SlotState, UnreadableStateError


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_exported_adapter_loads_in_plain_peft_and_scores_the_same(tmp_path: Path, *, use_rslora: bool) -> None:
    engine = make_engine()
    job = make_job("mine", rank=6, alpha=9.0, dropout=0.3, use_rslora=use_rslora, target_modules=("q_proj", "up_proj"))
    engine.admit(job)
    train(engine)
    engine.export_adapter("mine", tmp_path)
    examples = random_examples(50, 8)
    evaluation = evaluate(engine, "mine", examples)
    with torch.no_grad():
        expected = batch_loss(load_with_peft(tiny_llama(), tmp_path).eval(), examples).item()
    assert evaluation.loss == pytest.approx(expected, abs=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/llama"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 9, use_rslora)
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]


def test_an_imported_adapter_is_what_was_exported_and_starts_with_empty_moments(tmp_path: Path) -> None:
    engine = make_engine()
    engine.admit(make_job("old"))
    engine.admit(make_job("new", seed=2))
    train(engine, num_fused_steps=6)
    engine.export_adapter("old", tmp_path)
    engine.import_adapter("new", tmp_path)
    expected = weights_of(engine, "old")
    assert all(torch.equal(weights, expected[name]) for name, weights in weights_of(engine, "new").items())
    slot = engine._slots["new"]
    assert not slot.row.exp_avg_P.any()
    assert not slot.row.exp_avg_sq_P.any()
    assert slot.row.num_updates == 0


@pytest.mark.parametrize(
    "changes", [{"rank": 8}, {"target_modules": ("q_proj",)}, {"alpha": 16.0}, {"use_rslora": True}]
)
def test_an_adapter_of_another_shape_or_scale_is_refused_and_changes_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    engine = make_engine()
    engine.admit(make_job("old"))
    engine.admit(make_job("new", **changes))
    engine.export_adapter("old", tmp_path)
    before = weights_of(engine, "new")
    with pytest.raises(InvalidJobError):
        engine.import_adapter("new", tmp_path)
    assert all(torch.equal(weights, before[name]) for name, weights in weights_of(engine, "new").items())


def test_weights_that_are_not_what_their_configuration_says_are_refused(tmp_path: Path) -> None:
    engine = make_engine()
    engine.admit(make_job("wide", rank=8))
    engine.admit(make_job("mine", rank=4))
    engine.export_adapter("wide", tmp_path)
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    engine.export_adapter("mine", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(InvalidJobError, match=r"lora_A.weight is \(8, 64\), not \(4, 64\)"):
        engine.import_adapter("mine", tmp_path)


@pytest.mark.parametrize("num_fused_steps", [4, 5])
@pytest.mark.parametrize("max_tokens", [256, 24])
def test_resuming_in_the_middle_is_bitwise_never_having_stopped(
    tmp_path: Path, num_fused_steps: int, max_tokens: int
) -> None:
    job = make_job("mine", dropout=0.1)
    unbroken, first, second = (make_engine(max_tokens=max_tokens) for _ in range(3))
    unbroken.admit(job)
    expected = train(unbroken)["mine"]
    first.admit(job)
    updates = train(first, num_fused_steps=num_fused_steps)["mine"]
    first.capture_state("mine").write(tmp_path)
    second.admit(job)
    second.load_state("mine", tmp_path)
    assert updates + train(second)["mine"] == expected
    weights = weights_of(unbroken, "mine")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(second, "mine").items())


@pytest.mark.parametrize(("max_tokens", "num_fused_steps"), [(256, 4), (48, 7)])
def test_resuming_in_other_company_stays_on_the_solo_trajectory(
    tmp_path: Path, max_tokens: int, num_fused_steps: int
) -> None:
    job = make_job("mine", dropout=0.1)
    alone, first, second = make_engine(), make_engine(max_tokens=max_tokens), make_engine(max_tokens=max_tokens)
    alone.admit(job)
    expected = train(alone)["mine"]
    first.admit(make_job("left", seed=5))
    first.admit(job)
    first.admit(make_job("lost", seed=6, rank=2, dropout=0.3))
    updates = train(first, num_fused_steps=num_fused_steps)["mine"]
    first.capture_state("mine").write(tmp_path)
    second.admit(make_job("next", seed=7, rank=16, target_modules=("o_proj", "up_proj")))
    second.admit(job)
    assert second.load_state("mine", tmp_path) == updates[-1].step < expected[-1].step
    updates += train(second)["mine"]
    assert [update.step for update in updates] == [update.step for update in expected]
    assert [update.loss for update in updates] == pytest.approx([update.loss for update in expected], abs=1e-4)
    wanted = weights_of(alone, "mine")
    for name, tensor in weights_of(second, "mine").items():
        assert relative_difference(tensor, wanted[name]) < 1e-3, name


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    engine = make_engine()
    engine.admit(make_job("mine"))
    engine.capture_state("mine").write(tmp_path)
    cursor = json.loads((tmp_path / CURSOR_FILE).read_text(encoding="utf-8"))
    (tmp_path / CURSOR_FILE).write_text(json.dumps(cursor | {"format": "espalier-slot-99"}), encoding="utf-8")
    with pytest.raises(UnreadableStateError, match="of format espalier-slot-99"):
        engine.load_state("mine", tmp_path)


def test_a_state_of_before_a_field_of_the_spec_came_is_of_the_same_job(tmp_path: Path) -> None:
    engine = make_engine()
    engine.admit(make_job("mine"))
    engine.capture_state("mine").write(tmp_path)
    cursor = json.loads((tmp_path / CURSOR_FILE).read_text(encoding="utf-8"))
    del cursor["spec"]["epsilon"]  # which has its default
    (tmp_path / CURSOR_FILE).write_text(json.dumps(cursor), encoding="utf-8")
    assert engine.load_state("mine", tmp_path) == 0
    cursor["spec"]["a_field_to_come"] = 1
    (tmp_path / CURSOR_FILE).write_text(json.dumps(cursor), encoding="utf-8")
    with pytest.raises(InvalidJobError, match="another job"):
        engine.load_state("mine", tmp_path)


def write_as_before(engine: Engine, directory: Path) -> None:
    """Write a state as espalier-slot-1 was: each linear's A and then its B, one linear after the other."""
    state, slot = engine.capture_state("mine"), engine._slots["mine"]
    columns = [
        slot.row.bank.layout.columns[name]
        for name in engine._base.shape.linears
        if name in slot.row.bank.layout.columns
    ]
    places = [matrix for each in columns for matrix in each]
    assert places != sorted(places, key=lambda place: place.start), "the two formats are the same here"
    tensors = {name: torch.cat([vector[place] for place in places]) for name, vector in state.tensors.items()}
    SlotState(tensors, state.cursor | {"format": "espalier-slot-1"}).write(directory)


@pytest.mark.parametrize("modules", [ALL_MODULES, ("k_proj", "q_proj", "up_proj")])
def test_a_state_of_the_format_before_goes_on_bitwise_as_if_nothing_had_happened(
    tmp_path: Path, modules: tuple[str, ...]
) -> None:
    job = make_job("mine", dropout=0.1, target_modules=modules)
    unbroken, first, second = (make_engine() for _ in range(3))
    unbroken.admit(job)
    expected = train(unbroken)["mine"]
    first.admit(job)
    updates = train(first, num_fused_steps=4)["mine"]
    write_as_before(first, tmp_path)
    second.admit(job)
    assert second.load_state("mine", tmp_path) == 4
    assert updates + train(second)["mine"] == expected
    weights = weights_of(unbroken, "mine")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(second, "mine").items())


# The last commit whose states were espalier-slot-1.
BEFORE_SLOT_2 = "349866d^"
WRITER = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from tests.unit.engine.tiny import make_engine, make_job, train, weights_of
engine = make_engine()
engine.admit(make_job("mine", dropout=0.1))
train(engine, num_fused_steps=4)
engine.capture_state("mine").write(Path(sys.argv[1]))
save_file({name: each.contiguous() for name, each in weights_of(engine, "mine").items()}, sys.argv[1] + "/weights")
"""


def test_a_state_that_the_old_code_wrote_is_read(tmp_path: Path) -> None:
    old = unpack(BEFORE_SLOT_2, tmp_path / "old")
    env = {**os.environ, "PYTHONPATH": str(old)}
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], cwd=old, env=env, check=True)
    engine, unbroken = make_engine(), make_engine()
    for each in (engine, unbroken):
        each.admit(make_job("mine", dropout=0.1))
    assert engine.load_state("mine", tmp_path) == 4
    written = load_file(tmp_path / "weights")
    assert all(torch.equal(tensor, written[name]) for name, tensor in weights_of(engine, "mine").items())
    losses = [update.loss for update in train(engine)["mine"]]
    assert losses == pytest.approx([update.loss for update in train(unbroken)["mine"][4:]], abs=1e-4)


@pytest.mark.parametrize("changes", [{"seed": 2}, {"count": 11}, {"rank": 8}, {"batch_size": 2}, {"beta1": 0.5}])
def test_the_state_of_another_job_is_refused(tmp_path: Path, changes: dict[str, float]) -> None:
    engine = make_engine()
    engine.admit(make_job("mine"))
    engine.admit(make_job("other", **changes))  # type: ignore[arg-type]  # a mix of the keyword's types
    engine.capture_state("mine").write(tmp_path)
    with pytest.raises(InvalidJobError, match="another job"):
        engine.load_state("other", tmp_path)
