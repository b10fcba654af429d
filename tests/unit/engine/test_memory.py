"""How much of the device's memory a step and an engine take, and the state after a step that took too much."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.unit.engine.tiny import (
    evaluate,
    make_engine,
    make_job,
    make_spec,
    random_examples,
    tiny_llama,
    train,
)
from worker.engine import Engine, EngineJob, JobTooLargeError
from worker.engine.errors import ExampleTooLargeError
from worker.engine.memory import StepCost, measure_cost
from worker.engine.objectives import LabelRows, Sums
from worker.engine.packing import PackedBatch
from worker.engine.planner import SlotPlan


def test_nothing_of_a_base_outlives_its_engine() -> None:
    engine = make_engine()
    engine.admit(make_job("mine"))
    train(engine, num_fused_steps=1)
    context = weakref.ref(engine._context)  # every linear holds it
    del engine
    gc.collect()
    assert context() is None


class SmallDevice(Engine):
    """An engine whose device runs out of memory above so many tokens: in the forward, or only after the backward."""

    fits_tokens = fits_evaluating = 10**9
    fails_late = False

    def _forward_backward(self, plans: list[SlotPlan], batch: PackedBatch) -> list[Sums]:
        is_too_much = batch.token_ids_1T.shape[1] > self.fits_tokens
        if is_too_much and not self.fails_late:
            raise torch.OutOfMemoryError("the test's device is full")
        sums = super()._forward_backward(plans, batch)
        if is_too_much:
            raise torch.OutOfMemoryError("the test's device is full")
        return sums


def small_device() -> SmallDevice:
    engine = SmallDevice(tiny_llama(), base_model_id="x", max_slots=4, max_rank=16, max_tokens_per_step=256)
    score_labels = engine._base.score_labels

    def score_if_it_fits(batch: PackedBatch) -> list[LabelRows]:
        if batch.num_tokens > engine.fits_evaluating:
            raise torch.OutOfMemoryError("the test's device is full")
        return score_labels(batch)

    engine._base.score_labels = score_if_it_fits  # type: ignore[method-assign]
    return engine


@pytest.mark.fault(34)
@pytest.mark.parametrize("fails_late", [False, True])
def test_running_out_of_memory_replays_the_same_examples_in_smaller_steps(*, fails_late: bool) -> None:
    roomy, cramped = make_engine(), small_device()
    for engine in (roomy, cramped):
        engine.admit(make_job("a", dropout=0.1))
        engine.admit(make_job("b", seed=5, rank=8))
    cramped.fails_late = fails_late
    updates = train(cramped, num_fused_steps=2)
    cramped.fits_tokens = 40
    rest = train(cramped)
    expected = train(roomy)
    for slot_name in ("a", "b"):
        losses = [update.loss for update in updates[slot_name] + rest[slot_name]]
        assert losses == pytest.approx([update.loss for update in expected[slot_name]], abs=1e-4)


def test_one_example_that_alone_does_not_fit_fails_its_job_and_not_the_others() -> None:
    engine = small_device()
    engine.admit(EngineJob("long", make_spec(), random_examples(1, 2, low=60, high=61), "me"))
    engine.admit(make_job("short", seed=5))
    engine.fits_tokens = 30
    failures = []
    while reports := engine.step():
        for report in reports:
            if report.failure is not None:
                failures.append((report.slot_name, type(report.failure)))
                engine.evict(report.slot_name)
    assert failures == [("long", ExampleTooLargeError)]
    assert engine._slots["short"].cursor.is_finished


def test_the_budget_that_a_large_job_has_shrunk_is_whole_again_once_it_leaves() -> None:
    engine = small_device()
    engine.admit(EngineJob("long", make_spec(), random_examples(1, 2, low=60, high=61), "me"))
    engine.fits_tokens = 30
    (report,) = engine.step()
    assert isinstance(report.failure, JobTooLargeError)
    engine.fits_tokens = 10**9
    engine.evict("long")
    engine.admit(make_job("next", seed=5, batch_size=10))
    (report,) = engine.step()
    assert report.update is not None
    assert report.num_tokens > 60


def test_an_evaluation_that_does_not_fit_is_scored_in_parts_and_one_example_too_large_is_told() -> None:
    engine = small_device()
    engine.admit(make_job("mine"))
    examples = random_examples(60, 9)
    whole = evaluate(engine, "mine", examples)
    engine.fits_evaluating = 30
    parts = evaluate(engine, "mine", examples)
    assert (parts.loss, parts.token_accuracy) == pytest.approx((whole.loss, whole.token_accuracy), abs=1e-5)
    assert parts.num_units == whole.num_units
    with pytest.raises(JobTooLargeError):
        evaluate(engine, "mine", random_examples(1, 2, low=40, high=41))


def test_a_slot_holds_16_bytes_for_every_parameter_of_its_rank_rounded_up_to_8() -> None:
    engine = make_engine(max_rank=64)
    engine.admit(make_job("mine", rank=3, target_modules=("q_proj",)))
    slot = engine._slots["mine"]
    assert slot.row.bank.layout.num_parameters == 2 * 8 * (64 + 64)
    held = [slot.row.weights_P, slot.row.grads_P, slot.row.exp_avg_P, slot.row.exp_avg_sq_P]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == 16 * slot.row.bank.layout.num_parameters


@pytest.mark.parametrize("num_recomputed", [1, 2])
def test_recomputed_layers_change_nothing_but_what_is_kept(num_recomputed: int) -> None:
    plain, saving = make_engine(), make_engine()
    saving._memory.num_recomputed = num_recomputed
    for layer in saving._base.decoder.layers[:num_recomputed]:  # type: ignore[index]
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for engine in (plain, saving):
        engine.admit(make_job("a", dropout=0.3))
        engine.admit(make_job("b", seed=2, rank=16))
    assert train(plain) == train(saving)
    kept, of_saving = (measure_cost(engine._base).activation_bytes for engine in (plain, saving))
    assert of_saving < kept * (1 - 0.4 * num_recomputed)


def test_a_device_too_small_for_a_full_step_recomputes_as_few_layers_as_will_do() -> None:
    cost = StepCost(activation_bytes=1000.0, border_bytes=10.0, loss_bytes=500, num_layers=10)
    assert cost.predict(100, num_recomputed=0) == 100_500
    assert cost.choose_recomputed(100, usable_bytes=100_500) == 0
    # One layer whole is held while it is computed again, so the first one recomputed saves nothing.
    assert cost.choose_recomputed(100, usable_bytes=100_499) == 2
    assert cost.predict(100, num_recomputed=2) == 100 * (900 + 20) + 500
    assert cost.choose_recomputed(100, usable_bytes=0) == 10


class Called(torch.nn.Module):
    """A module that is one function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function


def test_nothing_is_left_of_a_step_that_ran_out_of_memory_between_two_siblings() -> None:
    model = tiny_llama()
    engine = make_engine(model)
    engine.admit(make_job("mine"))
    failed: list[weakref.ref[Any]] = []
    is_left: list[bool] = []
    first, last = (layer.mlp for layer in model.model.layers)

    def look(gate_1TN: torch.Tensor) -> torch.Tensor:
        is_left.extend(gate() is not None for gate in failed)
        return torch.nn.functional.silu(gate_1TN)

    def run_out_once(gate_1TN: torch.Tensor) -> torch.Tensor:
        if not failed:
            failed.append(weakref.ref(gate_1TN.grad_fn))
            raise torch.OutOfMemoryError("the test's device is full")
        return torch.nn.functional.silu(gate_1TN)

    first.act_fn, last.act_fn = Called(look), Called(run_out_once)
    (report,) = engine.step()
    assert report.failure is None
    assert is_left
    assert not any(is_left)
