"""Tenants share a step and nothing else: bitwise for a fixed composition, and no trace once a slot is freed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.engine.tiny import (
    VOCABULARY,
    fused_gradients,
    make_engine,
    make_job,
    random_examples,
    randomise_weights,
    train,
    weights_of,
)
from worker.engine import Engine, EngineJob, Example
from worker.engine.runs import Run, SlotRows, make_runs


def with_neighbours(neighbours: list[EngineJob]) -> Engine:
    engine = make_engine()
    engine.admit(neighbours[0])
    engine.admit(make_job("mine", seed=4, rank=6))
    engine.admit(neighbours[1])
    randomise_weights(engine, "mine")
    return engine


def other_tokens(job: EngineJob) -> EngineJob:
    """Return the job with other token ids at the same lengths and labels."""
    rng = np.random.default_rng(99)
    examples = [Example(rng.integers(1, VOCABULARY, size=e.num_tokens), e.is_label) for e in job.examples]
    return replace(job, examples=examples)


@pytest.mark.parametrize("fill", [1.0, 1e30, float("nan"), float("inf")])
def test_my_gradients_are_bitwise_the_same_whatever_my_neighbours_hold(fill: float) -> None:
    neighbours = [make_job("before", seed=5), make_job("after", seed=6, rank=16)]
    expected = fused_gradients(with_neighbours(neighbours))["mine"]
    engine = with_neighbours([other_tokens(job) for job in neighbours])
    for slot_name in ("before", "after"):
        engine._slots[slot_name].row.weights_P.fill_(fill)
    fused = fused_gradients(engine)
    assert all(torch.equal(fused["mine"][name], gradient) for name, gradient in expected.items())
    if not np.isfinite(fill):
        assert not all(gradient.isfinite().all() for gradient in fused["before"].values())


def record_runs(monkeypatch: pytest.MonkeyPatch, *, is_grouped: bool) -> list[tuple[Run, ...]]:
    """Let engines take their products batched, as on a CPU, or grouped, as on a GPU; return where each step's runs go."""
    recorded = []

    def record(parts: Sequence[SlotRows], **_device: bool) -> tuple[Run, ...]:
        recorded.append(make_runs(parts, is_grouped=is_grouped))
        return recorded[-1]

    monkeypatch.setattr("worker.engine.engine.make_runs", record)
    return recorded


def engine_of_one_kind(
    lengths: tuple[int, int, int], *, dropout: float = 0.0, has_stranger: bool = False, max_tokens: int = 256
) -> Engine:
    """Return an engine of three jobs that can share a run; a stranger's bank row stands before the last one's."""
    engine = make_engine(max_tokens=max_tokens)
    jobs = [
        replace(make_job(name, seed=seed, dropout=dropout), examples=random_examples(seed, 9, low=low, high=low + 1))
        for seed, (name, low) in enumerate(zip(("before", "poisoned", "after"), lengths, strict=True))
    ]
    stranger = make_job("stranger", seed=9, alpha=16.0)
    for job in [*jobs[:2], stranger, jobs[2]] if has_stranger else [*jobs, stranger]:
        engine.admit(job)
        randomise_weights(engine, job.slot_name, seed=job.spec.seed)
    return engine


@pytest.mark.parametrize("fill", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("lengths", "is_grouped", "has_stranger"),
    [((12, 12, 12), False, False), ((12, 12, 12), True, False), ((12, 7, 19), True, False), ((12, 7, 19), True, True)],
)
def test_my_gradients_are_bitwise_the_same_whatever_is_in_the_same_product(
    monkeypatch: pytest.MonkeyPatch,
    *,
    lengths: tuple[int, int, int],
    is_grouped: bool,
    has_stranger: bool,
    dropout: float,
    fill: float,
) -> None:
    recorded = record_runs(monkeypatch, is_grouped=is_grouped)
    engine = engine_of_one_kind(lengths, dropout=dropout, has_stranger=has_stranger)
    expected = fused_gradients(engine)
    shared = max(recorded[-1], key=lambda run: len(run.parts))
    assert [part.slot.job.slot_name for part in shared.parts] == ["before", "poisoned", "after"]
    assert isinstance(shared.bank_rows, torch.Tensor) == has_stranger
    engine._slots["poisoned"].row.weights_P.fill_(fill)
    found = fused_gradients(engine)
    for slot_name in ("before", "after", "stranger"):
        assert all(torch.equal(found[slot_name][name], gradient) for name, gradient in expected[slot_name].items())
    assert not any(torch.equal(found["poisoned"][name], gradient) for name, gradient in expected["poisoned"].items())


def test_rows_of_a_bank_that_are_no_neighbours_train_as_views_of_them_do(monkeypatch: pytest.MonkeyPatch) -> None:
    views, scattered = (engine_of_one_kind((12, 7, 19), has_stranger=True, max_tokens=64) for _ in range(2))
    expected = train(views)
    recorded = record_runs(monkeypatch, is_grouped=True)
    found = train(scattered)
    are_first = {run.kind.is_first for runs in recorded for run in runs if isinstance(run.bank_rows, torch.Tensor)}
    assert are_first == {True, False}
    for slot_name, updates in expected.items():
        losses, norms = [update.loss for update in updates], [update.grad_norm for update in updates]
        assert [update.loss for update in found[slot_name]] == pytest.approx(losses, abs=1e-4)
        assert [update.grad_norm for update in found[slot_name]] == pytest.approx(norms, rel=1e-3)


def test_a_neighbour_that_diverges_does_not_bend_my_trajectory() -> None:
    alone, among = make_engine(), make_engine()
    alone.admit(make_job("mine"))
    among.admit(make_job("broken", seed=5))
    among.admit(make_job("mine"))
    among._slots["broken"].row.weights_P.fill_(float("nan"))
    expected = [update.loss for update in train(alone)["mine"]]
    assert [update.loss for update in train(among)["mine"]] == pytest.approx(expected, abs=1e-4)


def test_joining_and_leaving_neighbours_do_not_bend_my_trajectory() -> None:
    alone = make_engine()
    alone.admit(make_job("mine"))
    expected = [update.loss for update in train(alone)["mine"]]
    engine = make_engine(max_tokens=64)
    engine.admit(make_job("first", seed=8))
    engine.admit(make_job("mine"))
    losses = [update.loss for update in train(engine, num_fused_steps=3)["mine"]]
    engine.evict("first")
    engine.admit(make_job("second", seed=9, rank=16))
    losses += [update.loss for update in train(engine, num_fused_steps=4)["mine"]]
    engine.admit(make_job("third", seed=10, rank=2))
    losses += [update.loss for update in train(engine)["mine"]]
    assert losses == pytest.approx(expected, abs=1e-4)


def test_a_freed_slot_is_scrubbed_and_the_next_tenant_trains_as_on_a_new_engine() -> None:
    engine = make_engine(max_slots=1)
    engine.admit(make_job("first", seed=8, rank=8, weight_decay=0.5))
    train(engine, num_fused_steps=5)
    slot = engine._slots["first"]
    tensors = [slot.row.weights_P, slot.row.exp_avg_P, slot.row.exp_avg_sq_P, slot.row.grads_P]
    assert all(bool(tensor.any()) for tensor in tensors)
    engine.evict("first")
    assert not any(bool(tensor.any()) for tensor in tensors)
    engine.admit(make_job("second"))
    train(engine)
    fresh = make_engine(max_slots=1)
    fresh.admit(make_job("second"))
    train(fresh)
    expected = weights_of(fresh, "second")
    assert all(torch.equal(weights, expected[name]) for name, weights in weights_of(engine, "second").items())


def test_a_neighbour_that_leaves_the_bank_takes_nothing_of_mine_along_and_leaves_nothing_behind() -> None:
    engine, untouched = make_engine(), make_engine()
    for slot_name in ("first", "mine", "last"):
        engine.admit(make_job(slot_name, seed=len(slot_name)))
        untouched.admit(make_job(slot_name, seed=len(slot_name)))
    for each in (engine, untouched):
        train(each, num_fused_steps=2)
    bank = engine._slots["mine"].row.bank
    before = [bank.weights_SP, bank.grads_SP, bank.exp_avg_SP, bank.exp_avg_sq_SP]
    engine.evict("first")
    assert (bank.num_rows, len(bank.weights_SP)) == (2, 2)
    assert sorted(slot.row.index for slot in engine._slots.values()) == [0, 1]
    assert not any(bool(tensor.any()) for tensor in before)
    for slot_name in ("mine", "last"):
        for name in ("weights_P", "exp_avg_P", "exp_avg_sq_P"):
            assert torch.equal(
                getattr(engine._slots[slot_name].row, name), getattr(untouched._slots[slot_name].row, name)
            )


def test_padded_ranks_have_a_gradient_of_exactly_zero_and_stay_zero() -> None:
    engine = make_engine()
    engine.admit(make_job("mine", rank=3, weight_decay=0.1, dropout=0.2))
    engine.admit(make_job("neighbour", seed=2, rank=8))
    slot = engine._slots["mine"]
    train(engine, num_fused_steps=4)
    layout = slot.row.bank.layout
    assert (layout.padded_rank, slot.row.bank.num_rows) == (8, 2)
    for matrices in layout.columns.values():
        for columns in matrices:
            for vector_P in (slot.row.weights_P, slot.row.grads_P, slot.row.exp_avg_P, slot.row.exp_avg_sq_P):
                assert not vector_P[columns].view(8, -1)[3:].any()
                assert vector_P[columns].view(8, -1)[:3].any()


def test_two_jobs_of_one_seed_start_alike_and_learn_their_own_data() -> None:
    engine = make_engine()
    engine.admit(make_job("a", seed=3))
    engine.admit(replace(make_job("b", seed=3), examples=random_examples(77, 10)))
    start = weights_of(engine, "a")
    assert all(torch.equal(weights, start[name]) for name, weights in weights_of(engine, "b").items())
    train(engine)
    trained = weights_of(engine, "a")
    assert not any(torch.equal(weights, trained[name]) for name, weights in weights_of(engine, "b").items())
