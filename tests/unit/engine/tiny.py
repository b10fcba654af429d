"""A tiny random Llama, data and the oracle: plain PEFT with a loop written by hand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from core.domain.training import AdapterConfig, TrainingSpec, count_steps, learning_rate_at, order_examples
from worker.engine import Engine, EngineJob, Evaluation, Example, StepMetrics
from worker.engine.packing import PackedBatch, pack
from worker.engine.planner import SlotPlan
from worker.engine.rows import LoraPair
from worker.engine.slots import Slot

VOCABULARY = 128
ALL_MODULES = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def tiny_llama(seed: int = 0) -> Any:  # transformers' decorator hides what its `to` takes
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def random_examples(seed: int, count: int, *, low: int = 4, high: int = 24) -> list[Example]:
    rng = np.random.default_rng(seed)
    examples = []
    for length in rng.integers(low, high, size=count):
        is_label = rng.random(length) < 0.6
        is_label[0], is_label[-1] = False, True
        examples.append(Example(rng.integers(1, VOCABULARY, size=length).astype(np.int64), is_label))
    return examples


def make_spec(**changes: object) -> TrainingSpec:
    adapter = {"rank": 4, "alpha": 8.0, "target_modules": ALL_MODULES} | {
        name: changes.pop(name)
        for name in ("rank", "alpha", "dropout", "target_modules", "use_rslora")
        if name in changes
    }
    values: dict[str, object] = {
        "adapter": AdapterConfig.model_validate(adapter),
        "n_epochs": 3,
        "batch_size": 3,
        "learning_rate": 5e-3,
        "max_seq_len": 64,
        "seed": 1,
        "weight_decay": 0.01,
    }
    return TrainingSpec.model_validate(values | changes)


def make_job(
    name: str, *, seed: int = 1, count: int = 10, tenant: str | None = None, share: float = 1.0, **changes: Any
) -> EngineJob:
    """Return a job, of a tenant of its own unless one is named."""
    spec = make_spec(seed=seed, **changes)
    return EngineJob(name, spec, random_examples(seed, count), tenant=tenant or name, share=share)


def make_engine(model: Any = None, *, max_slots: int = 4, max_rank: int = 16, max_tokens: int = 256) -> Engine:
    return Engine(
        model or tiny_llama(),
        base_model_id="tiny/llama",
        max_slots=max_slots,
        max_rank=max_rank,
        max_tokens_per_step=max_tokens,
    )


def train(engine: Engine, *, num_fused_steps: int = 1_000_000) -> dict[str, list[StepMetrics]]:
    """Step until nothing is left, or so often; return every job's updates."""
    updates: dict[str, list[StepMetrics]] = {slot_name: [] for slot_name in engine.slot_names}
    for _ in range(num_fused_steps):
        reports = engine.step()
        if not reports:
            break
        for report in reports:
            if report.update is not None:
                updates[report.slot_name].append(report.update)
    return updates


def evaluate(engine: Engine, slot_name: str, examples: Sequence[Example]) -> Evaluation:
    """Step until the job's evaluation is there. Raises the failure that ended it."""
    engine.begin_evaluation(slot_name, examples)
    while True:
        for report in engine.step():
            if report.failure is not None:
                raise report.failure
            if report.evaluation is not None:
                return report.evaluation


def randomise_weights(engine: Engine, slot_name: str, *, seed: int = 7) -> None:
    """Make B other than zero, so that A has gradients too."""
    generator = torch.Generator().manual_seed(seed)
    for pair in engine._slots[slot_name].row.pairs().values():
        for matrix in (pair.A_RK, pair.B_NR):
            matrix.copy_(torch.randn(matrix.shape, generator=generator) * 0.1)


def pack_plans(engine: Engine, plans: Sequence[SlotPlan]) -> PackedBatch:
    """Return the packed stream of a step with these plans."""
    return pack([plan.examples for plan in plans], engine.device)


def fused_gradients(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    """Return every job's gradients of one fused step, by PEFT's parameter names, without updating anything."""
    plans = engine._plan()
    engine._forward_backward(plans, pack_plans(engine, plans))
    return {plan.slot.job.slot_name: name_as_peft(gradient_pairs(plan.slot)) for plan in plans}


def gradient_pairs(slot: Slot) -> dict[str, LoraPair]:
    """Return a slot's gradients as its weights are viewed."""
    adapter, layout, pairs = slot.job.spec.adapter, slot.row.bank.layout, {}
    for name, columns in layout.columns.items():
        A_RK, Bt_RN = (slot.row.grads_P[side].clone().view(layout.padded_rank, -1) for side in columns)
        pairs[name] = LoraPair(A_RK[: adapter.rank], Bt_RN[: adapter.rank].T)
    return pairs


def weights_of(engine: Engine, slot_name: str) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in name_as_peft(engine._slots[slot_name].row.pairs()).items()}


def name_as_peft(pairs: dict[str, LoraPair]) -> dict[str, torch.Tensor]:
    named = {f"base_model.model.{name}.lora_A.weight": pair.A_RK for name, pair in pairs.items()}
    return named | {f"base_model.model.{name}.lora_B.weight": pair.B_NR for name, pair in pairs.items()}


def load_with_peft(base: torch.nn.Module, directory: Path) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for a property that the latter has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return PeftModel.from_pretrained(base, str(directory), is_trainable=True)


def peft_gradients(job: EngineJob, base: torch.nn.Module, directory: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of the job's first optimizer batch, by plain PEFT."""
    model = load_with_peft(base, directory)
    order = order_examples(job.spec.seed, 0, len(job.examples))
    loss = batch_loss(model, [job.examples[index] for index in order[: job.spec.batch_size]])
    loss.backward()
    return loss.item(), {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def train_with_peft(
    job: EngineJob, initial_adapter: Path, *, base: torch.nn.Module | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train a job with PEFT and torch's AdamW, example by example; return each step's loss and the LoRA weights."""
    model = load_with_peft(base or tiny_llama(), initial_adapter)
    spec, total = job.spec, count_steps(job.spec, len(job.examples))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=1.0, betas=(spec.beta1, spec.beta2), eps=spec.epsilon, weight_decay=spec.weight_decay
    )
    losses: list[float] = []
    for epoch in range(spec.n_epochs):
        order = order_examples(spec.seed, epoch, len(job.examples))
        for start in range(0, len(order), spec.batch_size):
            loss = batch_loss(model, [job.examples[index] for index in order[start : start + spec.batch_size]])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, spec.max_grad_norm)
            optimizer.param_groups[0]["lr"] = learning_rate_at(spec, len(losses) + 1, total)
            optimizer.step()
            losses.append(loss.item())
    trained = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return losses, trained


def batch_loss(model: Any, examples: Sequence[Example]) -> torch.Tensor:
    """Return the mean cross-entropy over the batch's label tokens, one example at a time, by transformers' own code."""
    sums = []
    for example in examples:
        ids = torch.from_numpy(example.token_ids)[None].to(model.device)
        losses = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        sums.append(losses[torch.from_numpy(example.is_label[1:]).to(model.device)].sum())
    return torch.stack(sums).sum() / sum(example.num_labels for example in examples)


def relative_difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-12))
