"""A job trained among others equals one trained alone by plain PEFT: losses, gradients, and the whole trajectory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import AutoConfig

from tests.unit.engine.tiny import (
    ALL_MODULES,
    VOCABULARY,
    fused_gradients,
    make_engine,
    make_job,
    pack_plans,
    peft_gradients,
    randomise_weights,
    relative_difference,
    tiny_llama,
    train,
    train_with_peft,
    weights_of,
)
from worker.engine import Engine, EngineJob
from worker.engine.runs import SlotRows, make_runs

TINY_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODERS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "phi": {"partial_rotary_factor": 0.5, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "phi3": {"sliding_window": 8, "resid_pdrop": 0.1},
    "smollm3": {},
}


def mixed_jobs() -> list[EngineJob]:
    return [
        make_job("wide", seed=1, rank=4, alpha=8.0, count=10),
        make_job("narrow", seed=2, rank=6, alpha=3.0, target_modules=("q_proj", "down_proj"), count=7),
        make_job("deep", seed=3, rank=16, use_rslora=True, batch_size=4, learning_rate_schedule="linear", count=9),
    ]


def admit_all(engine: Engine, jobs: list[EngineJob], directory: Path) -> None:
    for job in jobs:
        engine.admit(job)
        (directory / job.slot_name).mkdir()


def test_fused_gradients_and_losses_are_those_of_peft_alone(tmp_path: Path) -> None:
    engine, jobs = make_engine(), mixed_jobs()
    admit_all(engine, jobs, tmp_path)
    for job in jobs:
        randomise_weights(engine, job.slot_name)
        engine.export_adapter(job.slot_name, tmp_path / job.slot_name)
    fused = fused_gradients(engine)
    losses = {report.slot_name: report.update.loss for report in engine.step() if report.update}
    for job in jobs:
        loss, gradients = peft_gradients(job, tiny_llama(), tmp_path / job.slot_name)
        assert losses[job.slot_name] == pytest.approx(loss, abs=1e-5)
        assert fused[job.slot_name].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert relative_difference(fused[job.slot_name][name], gradient) < 1e-5


@pytest.mark.parametrize("max_tokens", [256, 40])
def test_whole_fused_training_ends_where_peft_alone_ends(tmp_path: Path, max_tokens: int) -> None:
    engine = make_engine(max_tokens=max_tokens)
    jobs = [job_of_30_steps(job) for job in mixed_jobs()]
    admit_all(engine, jobs, tmp_path)
    initial = {job.slot_name: weights_of(engine, job.slot_name) for job in jobs}
    for job in jobs:
        engine.export_adapter(job.slot_name, tmp_path / job.slot_name)
    updates = train(engine)
    for job in jobs:
        losses, trained = train_with_peft(job, tmp_path / job.slot_name)
        assert len(losses) >= 30
        assert [update.loss for update in updates[job.slot_name]] == pytest.approx(losses, abs=1e-4)
        weights, start = weights_of(engine, job.slot_name), initial[job.slot_name]
        got = torch.cat([(weights[name] - start[name]).flatten() for name in trained])
        wanted = torch.cat([(trained[name] - start[name]).flatten() for name in trained])
        assert relative_difference(got, wanted) < 1e-3


def job_of_30_steps(job: EngineJob) -> EngineJob:
    return replace(job, spec=job.spec.model_copy(update={"n_epochs": 10}))


@pytest.mark.parametrize("model_type", DECODERS)
def test_every_supported_decoder_agrees_with_peft(tmp_path: Path, model_type: str) -> None:
    engine = make_engine(tiny_decoder(model_type))
    target_modules = tuple(engine._base.shape.target_modules)
    jobs = [make_job(name, seed=seed, rank=4, target_modules=target_modules) for seed, name in enumerate("ab")]
    admit_all(engine, jobs, tmp_path)
    for job in jobs:
        randomise_weights(engine, job.slot_name)
        engine.export_adapter(job.slot_name, tmp_path / job.slot_name)
    fused = fused_gradients(engine)
    for job in jobs:
        oracle = tiny_decoder(model_type)
        oracle.eval()  # the base's own dropout is off in the engine as well
        _, gradients = peft_gradients(job, oracle, tmp_path / job.slot_name)
        assert fused[job.slot_name].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert relative_difference(fused[job.slot_name][name], gradient) < 1e-5


def tiny_decoder(model_type: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(TINY_SIZES | DECODERS[model_type]))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def test_nf4_base_trains_as_its_dequantised_twin(tmp_path: Path) -> None:
    quantised, twin = tiny_llama(), tiny_llama()
    replace_by_nf4(quantised, twin)
    engine, jobs = make_engine(quantised), mixed_jobs()
    assert engine._base.shape.target_modules == ALL_MODULES
    admit_all(engine, jobs, tmp_path)
    for job in jobs:
        randomise_weights(engine, job.slot_name)
        engine.export_adapter(job.slot_name, tmp_path / job.slot_name)
    fused = fused_gradients(engine)
    for job in jobs:
        _, gradients = peft_gradients(job, twin, tmp_path / job.slot_name)
        for name, gradient in gradients.items():
            assert relative_difference(fused[job.slot_name][name], gradient) < 1e-4
        twin = tiny_llama()
        replace_by_nf4(tiny_llama(), twin)


def replace_by_nf4(model: torch.nn.Module, twin: Any) -> None:
    """Quantise the model's linears (NF4, double quantisation); give the twin the weights they stand for."""
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        layer = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        layer.weight = Params4bit(
            linear.weight.data.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        layer.to("cpu")
        model.set_submodule(name, layer)
        restored = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        twin.get_submodule(name).weight.data.copy_(restored)


def test_dropout_is_the_same_alone_and_among_others() -> None:
    alone, among = make_engine(), make_engine(max_tokens=48)
    alone.admit(make_job("mine", dropout=0.3))
    among.admit(make_job("other", seed=5, rank=8, dropout=0.5))
    among.admit(make_job("mine", dropout=0.3))
    expected = [update.loss for update in train(alone)["mine"]]
    assert [update.loss for update in train(among)["mine"]] == pytest.approx(expected, abs=1e-4)
    plain = make_engine()
    plain.admit(make_job("mine"))
    assert [update.loss for update in train(plain)["mine"]] != pytest.approx(expected, abs=1e-4)


def test_dropout_differs_between_examples_and_between_epochs() -> None:
    engine = make_engine()
    job = make_job("mine", dropout=0.4, batch_size=2, count=1)
    engine.admit(replace(job, examples=[job.examples[0]] * 2))
    randomise_weights(engine, "mine")
    first, second = losses_of_rows(engine).chunk(2)
    assert not torch.equal(first, second)
    engine._slots["mine"].advance()
    later = losses_of_rows(engine)
    assert not any(torch.equal(one, other) for one in (first, second) for other in later.chunk(2))


def losses_of_rows(engine: Engine) -> torch.Tensor:
    (plan,) = engine._plan()
    batch = pack_plans(engine, [plan])
    with engine._context.running(make_runs([SlotRows(plan.slot, batch.groups[0])], is_grouped=False)):
        (rows,) = engine._base.score_labels(batch)
    return rows.nll_M.detach()


def test_dropout_gradient_is_that_of_the_loss_it_gives() -> None:
    engine = make_engine()
    engine.admit(make_job("mine", dropout=0.4))
    randomise_weights(engine, "mine")
    slot = engine._slots["mine"]
    gradient_P = flat_gradient(engine)[1]
    slope = float(gradient_P.norm())
    direction_P, width = gradient_P / slope, 1e-2
    slot.row.weights_P.add_(direction_P, alpha=width)
    above = flat_gradient(engine)[0]
    slot.row.weights_P.sub_(direction_P, alpha=2 * width)
    below = flat_gradient(engine)[0]
    assert (above - below) / (2 * width) == pytest.approx(slope, rel=2e-2)


def flat_gradient(engine: Engine) -> tuple[float, torch.Tensor]:
    plans = engine._plan()
    (sums,) = engine._forward_backward(plans, pack_plans(engine, plans))
    return float(sums.loss.detach()) / plans[0].slot.num_units, plans[0].slot.row.grads_P.clone()
