"""The token budget of a step is shared fairly, and any schedule of joins and leaves leaves a job's trajectory alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine.tiny import make_engine, make_job, make_spec, tiny_llama, train
from worker.engine import EngineJob, Example, inspect_base
from worker.engine.planner import plan_step
from worker.engine.slots import Slot


def slot_of(name: str, lengths: list[int], *, share: float = 1.0, batch_size: int = 64) -> Slot:
    examples = [Example(np.ones(length, dtype=np.int64), np.arange(length) > 0) for length in lengths]
    job = EngineJob(name, make_spec(batch_size=batch_size, n_epochs=50, target_modules=("q_proj",)), examples, share)
    return Slot(job, inspect_base(tiny_llama()), index=0, device=torch.device("cpu"))


def run_plan(slots: list[Slot], budget: int) -> dict[str, int]:
    """Plan one step, take its examples as trained, and return each job's tokens."""
    plans = plan_step(slots, budget)
    for plan in plans:
        plan.slot.tally.position += len(plan.example_indices)
        if not plan.slot.waiting_indices():
            plan.slot.advance()
    return {plan.slot.job.job_id: plan.num_tokens for plan in plans}


def test_busy_jobs_get_tokens_in_proportion_to_their_shares() -> None:
    slots = [slot_of("double", [9, 14, 5] * 20, share=2.0), slot_of("single", [11, 7, 13] * 20)]
    totals = {"double": 0, "single": 0}
    for _ in range(120):
        for job_id, num_tokens in run_plan(slots, 60).items():
            totals[job_id] += num_tokens
    assert totals["double"] / totals["single"] == pytest.approx(2.0, rel=0.1)


def test_what_one_job_cannot_use_goes_to_the_others() -> None:
    slots = [slot_of("small", [10], batch_size=1), slot_of("large", [10] * 64)]
    assert run_plan(slots, 100) == {"small": 10, "large": 90}


def test_a_job_stops_at_the_end_of_its_own_batch() -> None:
    assert run_plan([slot_of("mine", [10] * 8, batch_size=4)], 1000) == {"mine": 40}


def test_an_example_larger_than_its_share_is_not_starved() -> None:
    slots = [slot_of("long", [90] * 4), slot_of("short", [10] * 64)]
    assert any("long" in run_plan(slots, 100) for _ in range(10))


def test_an_example_larger_than_a_shrunken_budget_goes_alone() -> None:
    assert run_plan([slot_of("long", [90] * 4)], 20) == {"long": 90}


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=12), min_size=1, max_size=4),
    budget=st.integers(30, 120),
    shares=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=4, max_size=4),
)
def test_every_step_makes_progress_within_its_budget_and_takes_examples_in_order(
    lengths: list[list[int]], budget: int, shares: list[float]
) -> None:
    slots = [
        slot_of(str(number), of_one, share=share, batch_size=5)
        for number, (of_one, share) in enumerate(zip(lengths, shares, strict=False))
    ]
    for _ in range(20):
        waiting = {slot.job.job_id: slot.waiting_indices() for slot in slots}
        plans = plan_step(slots, budget)
        assert plans
        assert sum(plan.num_tokens for plan in plans) <= budget
        for plan in plans:
            assert plan.example_indices == waiting[plan.slot.job.job_id][: len(plan.example_indices)]
            plan.slot.tally.position += len(plan.example_indices)
            if not plan.slot.waiting_indices():
                plan.slot.advance()


neighbours = st.builds(
    make_job,
    st.just("unnamed"),
    seed=st.integers(10, 1000),
    count=st.integers(1, 6),
    share=st.sampled_from([0.5, 1.0, 4.0]),
    rank=st.sampled_from([1, 3, 8, 16]),
    n_epochs=st.integers(1, 2),
    batch_size=st.integers(1, 4),
    target_modules=st.sampled_from([("q_proj",), ("gate_proj", "down_proj"), ("o_proj", "k_proj", "v_proj")]),
)


@settings(deadline=None, max_examples=12)
@given(joins=st.lists(st.tuples(st.integers(0, 5), neighbours), max_size=4), max_tokens=st.sampled_from([32, 64, 200]))
def test_any_company_leaves_a_job_on_its_solo_trajectory(joins: list[tuple[int, EngineJob]], max_tokens: int) -> None:
    alone, among = make_engine(max_slots=5), make_engine(max_slots=5, max_tokens=max_tokens)
    mine = make_job("mine", n_epochs=2, count=7)
    alone.admit(mine)
    expected = [update.loss for update in train(alone)["mine"]]
    among.admit(mine)
    losses: list[float] = []
    for moment in range(6):
        for number, (at, job) in enumerate(joins):
            if at == moment:
                among.admit(EngineJob(f"neighbour-{number}", job.spec, job.examples, job.share))
            elif at + 2 == moment and f"neighbour-{number}" in among.job_ids:
                among.evict(f"neighbour-{number}")
        losses += [update.loss for update in train(among, num_fused_steps=1)["mine"]]
    losses += [update.loss for update in train(among)["mine"]]
    assert losses == pytest.approx(expected, abs=1e-4)
