"""What the engine admits, refuses, reports and survives."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.unit.engine.tiny import (
    ALL_MODULES,
    evaluate,
    make_engine,
    make_job,
    make_spec,
    pack_plans,
    random_examples,
    tiny_llama,
    train,
    weights_of,
)
from worker.engine import (
    DivergedError,
    EngineJob,
    Example,
    InvalidJobError,
    JobTooLargeError,
    NoFreeSlotError,
    UnsupportedBaseError,
    inspect_base,
)
from worker.engine.banks import Layout
from worker.engine.memory import DeviceMemory
from worker.engine.updates import read_sums


def example_of(token_ids: list[int], is_label: list[bool]) -> Example:
    return Example(np.array(token_ids, dtype=np.int64), np.array(is_label))


SOUND = random_examples(3, 300)


def test_the_base_says_which_modules_it_can_adapt() -> None:
    shape = inspect_base(tiny_llama())
    assert shape.target_modules == ALL_MODULES
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (2, 64, 128)
    assert shape.linears["model.layers.1.mlp.down_proj"] == (96, 64)


def test_a_base_that_cannot_be_fused_is_refused_with_the_reason() -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, is_decoder=True
    )
    with pytest.raises(UnsupportedBaseError, match=r"'bert' cannot be fused; supported: .*llama"):
        inspect_base(BertLMHeadModel(config))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_base_whose_positions_depend_on_the_longest_sequence_of_a_step_is_refused(rope_type: str) -> None:
    config = LlamaConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=8)
    model = LlamaForCausalLM(config)
    model.config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedBaseError, match=f"'{rope_type}' depend on the longest sequence"):
        inspect_base(model)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan")])
def test_a_share_that_is_not_positive_is_the_callers_mistake(share: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        make_engine().admit(make_job("mine", share=share))


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (make_job("new", rank=17), "Rank 17 is above"),
        (make_job("new", target_modules=("qkv",)), "has no qkv; it has down_proj"),
        (EngineJob("new", make_spec(), (), "me"), "no example"),
        (EngineJob("new", make_spec(), [example_of([1, 2], [True, False])], "me"), "nothing to learn"),
        (EngineJob("new", make_spec(), [example_of([1, 2, 3], [False, True])], "me"), "nothing to learn"),
        (EngineJob("new", make_spec(), [example_of([1, 128], [False, True])], "me"), "outside the base's vocabulary"),
        (EngineJob("new", make_spec(), [example_of([-1, 2], [False, True])], "me"), "outside the base's vocabulary"),
        (EngineJob("new", make_spec(), random_examples(1, 1, low=257, high=258), "me"), "257 tokens"),
        (EngineJob("new", make_spec(), [example_of([], [])], "me"), "nothing to learn"),
        (EngineJob("new", make_spec(), [*SOUND, example_of([1, 2], [True, False]), *SOUND], "me"), "nothing to learn"),
        (EngineJob("new", make_spec(), [*SOUND, example_of([1, 128], [False, True])], "me"), "outside the base's"),
        (make_job("old"), "admitted already"),
    ],
)
def test_a_job_that_does_not_fit_is_refused_before_it_takes_a_slot(job: EngineJob, reason: str) -> None:
    engine = make_engine()
    engine.admit(make_job("old"))
    with pytest.raises(InvalidJobError, match=reason):
        engine.admit(job)
    assert engine.slot_names == ("old",)


def test_a_job_waits_when_every_slot_is_taken_and_enters_when_one_is_freed() -> None:
    engine = make_engine(max_slots=1)
    engine.admit(make_job("a"))
    assert engine.num_free_slots == 0
    with pytest.raises(NoFreeSlotError):
        engine.admit(make_job("b"))
    engine.evict("a")
    engine.admit(make_job("b"))
    assert engine.slot_names == ("b",)


@pytest.mark.fault(34)
def test_a_job_waits_when_the_device_refuses_the_memory_for_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("the test's device is full")

    engine = make_engine()
    engine.admit(make_job("old"))
    with monkeypatch.context() as full, pytest.raises(NoFreeSlotError, match="no memory"):
        full.setattr(torch.Tensor, "new_zeros", refuse)
        engine.admit(make_job("new"))
    assert engine.slot_names == ("old",)
    assert engine.step()


def leave_bytes(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let every device have so many bytes left beside the base and the slots."""
    monkeypatch.setattr(DeviceMemory, "usable_bytes", num_bytes)


def test_a_slot_that_would_leave_a_full_step_too_little_waits_and_one_that_never_fits_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(max_rank=64)
    step_bytes = engine._memory.predict(256)
    row_bytes = 16 * Layout.of(engine._base.shape, rank=16, target_modules=ALL_MODULES).num_parameters
    leave_bytes(monkeypatch, step_bytes + row_bytes - 1)
    with pytest.raises(JobTooLargeError, match="lower the rank"):
        engine.admit(make_job("mine", rank=16))
    leave_bytes(monkeypatch, step_bytes + row_bytes)
    engine.admit(make_job("mine", rank=16))
    leave_bytes(monkeypatch, step_bytes)
    with pytest.raises(NoFreeSlotError, match="no memory"):
        engine.admit(make_job("other", seed=2, rank=16))
    engine.evict("mine")
    leave_bytes(monkeypatch, step_bytes + row_bytes)
    engine.admit(make_job("other", seed=2, rank=16))


def test_layers_are_recomputed_where_the_slots_would_lack_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    load = partial(make_engine, max_slots=2, max_rank=64)
    leave_bytes(monkeypatch, 10**9)
    roomy = load()
    row_bytes = 16 * Layout.of(roomy._base.shape, rank=16, target_modules=ALL_MODULES).num_parameters
    leave_bytes(monkeypatch, roomy._memory.predict(256) + 2 * row_bytes)
    assert load()._memory.num_recomputed == 0
    leave_bytes(monkeypatch, roomy._memory.predict(256) + row_bytes - 1)
    engine = load()
    assert engine._memory.num_recomputed == 2
    engine.admit(make_job("mine", rank=16))
    leave_bytes(monkeypatch, roomy._memory.predict(256) - 1)
    engine.admit(make_job("other", seed=2, rank=16))


def test_the_examples_of_a_job_that_waits_for_memory_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(max_rank=64)
    engine.admit(make_job("mine"))
    leave_bytes(monkeypatch, 0)
    with pytest.raises(NoFreeSlotError, match="no memory"):
        engine.admit(EngineJob("other", make_spec(), UnreadableExamples(), "other"))


class UnreadableExamples(tuple[Example, ...]):
    """Examples that fail the test that reads one."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Example]:
        raise AssertionError

    def __len__(self) -> int:
        raise AssertionError


def test_updates_count_steps_epochs_and_tokens() -> None:
    engine = make_engine()
    job = make_job("mine", n_epochs=2, batch_size=4, count=10)
    engine.admit(job)
    updates = train(engine)["mine"]
    assert [update.step for update in updates] == [1, 2, 3, 4, 5, 6]
    assert [update.is_epoch_end for update in updates] == [False, False, True, False, False, True]
    assert [update.is_last for update in updates] == [False] * 5 + [True]
    assert updates[2].epoch == 1.0
    assert sum(update.num_tokens for update in updates) == 2 * sum(e.num_tokens for e in job.examples)
    assert sum(update.num_units for update in updates) == 2 * sum(e.num_labels for e in job.examples)
    assert updates[-1].loss < updates[0].loss
    assert engine.step() == ()


def test_an_engine_without_jobs_has_nothing_to_do() -> None:
    assert make_engine().step() == ()


def test_evaluation_does_not_disturb_training_and_knows_no_dropout() -> None:
    plain, watched = make_engine(max_tokens=48), make_engine(max_tokens=48)
    for engine in (plain, watched):
        engine.admit(make_job("mine", dropout=0.5))
        train(engine, num_fused_steps=3)
    validation = random_examples(60, 9)
    first, second = (evaluate(watched, "mine", validation) for _ in range(2))
    assert first == second
    assert first.num_units == sum(example.num_labels for example in validation)
    assert 0 <= first.token_accuracy <= 1
    train(plain)
    train(watched)
    expected = weights_of(plain, "mine")
    assert all(torch.equal(weights, expected[name]) for name, weights in weights_of(watched, "mine").items())


@pytest.mark.parametrize("examples", [[], [example_of([1, 128], [False, True])], [example_of([1, 2], [False, False])]])
def test_examples_that_cannot_be_evaluated_are_refused(examples: list[Example]) -> None:
    engine = make_engine()
    engine.admit(make_job("mine"))
    with pytest.raises(InvalidJobError):
        engine.begin_evaluation("mine", examples)


def test_a_large_validation_set_is_scored_between_the_others_steps_and_the_weights_rest() -> None:
    engine = make_engine(max_tokens=64)
    engine.admit(make_job("mine"))
    engine.admit(make_job("other", seed=5, n_epochs=50))
    validation = random_examples(60, 40)
    train(engine, num_fused_steps=3)
    before, position = weights_of(engine, "mine"), engine._slots["mine"].cursor.step
    engine.begin_evaluation("mine", validation)
    num_scored, num_parts, evaluation = 0, 0, None
    while evaluation is None:
        reports = {report.slot_name: report for report in engine.step()}
        assert reports["other"].num_tokens > 0
        assert 0 < reports["mine"].num_scored_tokens <= 64
        assert reports["mine"].num_tokens == 0
        num_scored += reports["mine"].num_scored_tokens
        num_parts += 1
        evaluation = reports["mine"].evaluation
    assert num_parts > 5
    assert num_scored == sum(example.num_tokens for example in validation)
    assert all(torch.equal(weights, before[name]) for name, weights in weights_of(engine, "mine").items())
    assert evaluation.num_units == sum(example.num_labels for example in validation)
    train(engine, num_fused_steps=5)
    assert engine._slots["mine"].cursor.step > position


def test_evaluations_of_two_jobs_take_turns() -> None:
    engine = make_engine(max_tokens=64)
    for index in range(2):
        engine.admit(make_job(str(index), seed=index))
        engine.begin_evaluation(str(index), random_examples(60, 40))
    order = [report.slot_name for _ in range(6) for report in engine.step()]
    assert order == ["0", "1"] * 3


def test_a_validation_loss_that_is_not_finite_ends_the_job() -> None:
    engine = make_engine()
    engine.admit(make_job("broken"))
    engine._slots["broken"].row.weights_P.fill_(float("nan"))
    with pytest.raises(DivergedError):
        evaluate(engine, "broken", random_examples(60, 3))


def test_three_steps_in_a_row_that_are_not_finite_end_the_job_and_only_that_job() -> None:
    engine = make_engine()
    engine.admit(make_job("mine"))
    engine.admit(make_job("broken", seed=5))
    engine._slots["broken"].row.weights_P.fill_(float("nan"))
    for num_skipped in (1, 2, 3):
        mine, broken = engine.step()
        assert mine.update is not None
        assert not mine.update.is_skipped
        assert mine.failure is None
        assert broken.update is not None
        assert broken.update.is_skipped
        assert isinstance(broken.failure, DivergedError) == (num_skipped == 3)


def test_one_step_that_is_not_finite_is_skipped_without_touching_weights_or_moments() -> None:
    engine = make_engine()
    engine.admit(make_job("mine"))
    train(engine, num_fused_steps=2)
    slot = engine._slots["mine"]
    before = [tensor.clone() for tensor in (slot.row.weights_P, slot.row.exp_avg_P, slot.row.exp_avg_sq_P)]
    good = slot.row.weights_P.clone()
    slot.row.weights_P.fill_(float("inf"))
    plans = engine._plan()
    batch = pack_plans(engine, plans)
    sums = engine._forward_backward(plans, batch)
    slot.row.weights_P.copy_(good)
    (report,) = engine._commit(plans, read_sums([slot], sums), ())
    assert report.update is not None
    assert report.update.is_skipped
    after = (slot.row.weights_P, slot.row.exp_avg_P, slot.row.exp_avg_sq_P)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert slot.num_skipped_in_a_row == 1
    train(engine, num_fused_steps=1)
    assert slot.num_skipped_in_a_row == 0
