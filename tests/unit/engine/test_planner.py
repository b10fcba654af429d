"""The token budget of a step is shared fairly, and no order of joins and leaves changes a job's trajectory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine.tiny import make_engine, make_job, make_spec, random_examples, tiny_llama, train
from worker.engine import EngineJob, Example, StepMetrics, inspect_base
from worker.engine.banks import Bank, Layout
from worker.engine.planner import Planner
from worker.engine.slots import Slot

LAYOUT = Layout.of(inspect_base(tiny_llama()), rank=1, target_modules=("q_proj",))


def slot_of(
    name: str, lengths: list[int], *, tenant: str | None = None, share: float = 1.0, batch_size: int = 64
) -> Slot:
    examples = [Example(np.ones(length, dtype=np.int64), np.arange(length) > 0) for length in lengths]
    spec = make_spec(batch_size=batch_size, n_epochs=50, rank=1, target_modules=("q_proj",))
    job = EngineJob(name, spec, examples, tenant=tenant or name, share=share)
    return Slot(job, Bank(LAYOUT, 0, torch.device("cpu")))


def run_step(
    planner: Planner, slots: list[Slot], budget: int, *, scored: dict[str, float] | None = None
) -> dict[str, int]:
    """Plan one step, book its examples as trained, and return each job's tokens."""
    plans = planner.plan(slots, budget)
    planner.charge(plans, slots, budget, scored=scored or {})
    for plan in plans:
        plan.slot.count(num_examples=len(plan.examples), num_tokens=plan.num_tokens, loss_sum=0, num_right=0)
        if plan.slot.cursor.is_batch_complete:
            plan.slot.advance()
    return {plan.slot.job.slot_name: plan.num_tokens for plan in plans}


def run_steps(slots: list[Slot], budget: int, num_steps: int) -> dict[str, int]:
    """Return the tokens of every tenant."""
    planner, totals = Planner(), dict.fromkeys((slot.job.tenant for slot in slots), 0)
    for _ in range(num_steps):
        for slot_name, num_tokens in run_step(planner, slots, budget).items():
            totals[next(slot.job.tenant for slot in slots if slot.job.slot_name == slot_name)] += num_tokens
    return totals


def test_busy_tenants_get_tokens_in_proportion_to_their_shares() -> None:
    slots = [slot_of("double", [9, 14, 5] * 20, share=2.0), slot_of("single", [11, 7, 13] * 20)]
    totals = run_steps(slots, 60, 120)
    assert totals["double"] / totals["single"] == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(("one_share", "many_share"), [(1.0, 1.0), (1.0, 3.0)])
def test_a_tenant_with_one_job_beside_a_tenant_with_twenty_gets_its_share(one_share: float, many_share: float) -> None:
    rng = np.random.default_rng(3)
    slots = [slot_of("one", rng.integers(5, 60, 64).tolist(), share=one_share)]
    for number in range(20):
        lengths = rng.integers(5, 60, 64).tolist()
        slots.append(slot_of(f"many-{number}", lengths, tenant="many", share=many_share))
    totals = run_steps(slots, 512, 200)
    entitled = one_share / (one_share + many_share)
    assert totals["one"] / sum(totals.values()) == pytest.approx(entitled, rel=0.05)


def test_what_a_tenant_has_scored_counts_as_half_of_what_it_could_have_trained() -> None:
    """One job of the tenant is evaluated all the time, at a cost of 20 of its 50 tokens a step; another trains."""
    slots = [slot_of("trains", [5, 9] * 32, tenant="mine"), slot_of("yours", [5, 9] * 32)]
    planner, totals = Planner(), {"trains": 0, "yours": 0}
    for _ in range(200):
        for slot_name, num_tokens in run_step(planner, slots, 100, scored={"mine": 20.0}).items():
            totals[slot_name] += num_tokens
    assert (totals["trains"] + 200 * 20) / totals["yours"] == pytest.approx(1.0, rel=0.05)


def test_the_jobs_of_one_tenant_get_the_same() -> None:
    slots = [slot_of(str(n), [5 + n] * 64, tenant="mine") for n in range(4)]
    planner, totals = Planner(), dict.fromkeys("0123", 0)
    for _ in range(200):
        for slot_name, num_tokens in run_step(planner, slots, 30).items():
            totals[slot_name] += num_tokens
    assert max(totals.values()) / min(totals.values()) < 1.02


def test_a_newcomer_is_in_the_next_step_however_many_jobs_its_tenant_has() -> None:
    slots = [slot_of("one", [40] * 64)] + [slot_of(f"many-{n}", [60] * 64, tenant="many") for n in range(20)]
    planner = Planner()
    for _ in range(30):
        run_step(planner, slots, 256)
    newcomer = slot_of("newcomer", [200] * 64, tenant="many")
    newcomer.served_tokens = min(slot.served_tokens for slot in slots[1:])
    slots.append(newcomer)
    assert run_step(planner, slots, 256)["newcomer"] == 200
    totals = dict.fromkeys(("one", "many"), 0)
    for _ in range(100):
        for slot_name, num_tokens in run_step(planner, slots, 256).items():
            totals["one" if slot_name == "one" else "many"] += num_tokens
    assert totals["one"] / sum(totals.values()) == pytest.approx(0.5, rel=0.05)


def test_a_tenant_that_submits_jobs_of_one_row_all_the_time_gets_its_share_and_no_more() -> None:
    planner, steady, waiting, totals = (
        Planner(),
        slot_of("steady", [12] * 256, batch_size=256),
        [],
        {"steady": 0, "flood": 0},
    )
    for number in range(400):
        waiting.append(slot_of(str(number), [500], tenant="flood"))
        tokens = run_step(planner, [*waiting, steady], 512)
        totals["steady"] += tokens.pop("steady", 0)
        totals["flood"] += sum(tokens.values())
        waiting = [slot for slot in waiting if slot.job.slot_name not in tokens]
    assert totals["flood"] / sum(totals.values()) == pytest.approx(0.5, abs=0.02)


def test_a_newcomer_of_a_tenant_that_is_ahead_by_less_than_a_step_starts_at_once() -> None:
    planner, slots = Planner(), [slot_of("yours", [4] * 64)]
    for number in range(3):
        slots.append(slot_of(str(number), [300], tenant="mine"))
        assert run_step(planner, slots, 512)[str(number)] == 300


def test_what_one_job_cannot_use_goes_to_the_others() -> None:
    slots = [slot_of("small", [10], batch_size=1), slot_of("large", [10] * 64)]
    assert run_step(Planner(), slots, 100) == {"small": 10, "large": 90}


def test_a_job_stops_at_the_end_of_its_own_batch() -> None:
    assert run_step(Planner(), [slot_of("mine", [10] * 8, batch_size=4)], 1000) == {"mine": 40}


def test_an_example_larger_than_its_share_is_not_starved() -> None:
    slots = [slot_of("long", [90] * 4), slot_of("short", [10] * 64)]
    assert run_steps(slots, 100, 20)["long"] >= 9 * 90


def test_an_example_larger_than_a_shrunken_budget_goes_alone() -> None:
    slots = [slot_of("long", [90] * 4), slot_of("short", [10] * 64)]
    assert run_step(Planner(), slots, 20) == {"long": 90}


@pytest.mark.parametrize("share", [1.0, 3.0])
@pytest.mark.parametrize("length", [60, 150])
def test_an_example_larger_than_a_shrunken_budget_takes_turns_with_a_stream_of_short_ones(
    length: int, share: float
) -> None:
    slots = [slot_of("short", [5, 9] * 64, share=share), slot_of("long", [length] * 64)]
    planner, totals, last_at, longest_wait = Planner(), {"short": 0, "long": 0}, 0, 0
    for step in range(1, 401):
        tokens = run_step(planner, slots, 40)
        assert sum(tokens.values()) <= 40 or tokens == {"long": length}
        if "long" in tokens:
            longest_wait, last_at = max(longest_wait, step - last_at), step
        for slot_name, num_tokens in tokens.items():
            totals[slot_name] += num_tokens
    assert longest_wait <= (1 + share) * length / 40 + 2
    assert totals["short"] / totals["long"] == pytest.approx(share, rel=0.05)


def test_a_long_example_does_not_wait_behind_short_ones_of_its_own_tenant() -> None:
    """All lengths divide the budget evenly: no tenant ever falls behind but by saving up."""
    slots = [slot_of("yours", [20] * 64)]
    slots += [slot_of("short", [20] * 64, tenant="mine"), slot_of("long", [60] * 64, tenant="mine")]
    planner, totals = Planner(), {"yours": 0, "short": 0, "long": 0}
    for _ in range(300):
        for slot_name, num_tokens in run_step(planner, slots, 40).items():
            totals[slot_name] += num_tokens
    assert totals["long"] == pytest.approx(totals["short"], rel=0.05)
    assert totals["yours"] == pytest.approx(totals["short"] + totals["long"], rel=0.05)


def test_what_a_tenant_had_no_examples_for_is_saved_up_to_one_step_and_no_further() -> None:
    slots = [slot_of("small", [10], batch_size=1), slot_of("large", [10] * 64)]
    planner = Planner()
    for _ in range(40):
        run_step(planner, slots, 100)
    slots.append(slot_of("more", [10] * 64, tenant="small"))
    totals = {"small": 0, "large": 0, "more": 0}
    for _ in range(20):
        for slot_name, num_tokens in run_step(planner, slots, 100).items():
            totals[slot_name] += num_tokens
    assert totals["large"] >= 0.4 * 20 * 100


def test_a_plan_can_be_made_again() -> None:
    planner, slots = Planner(), [slot_of("a", [9, 14, 5] * 20), slot_of("b", [11, 7] * 20)]
    run_step(planner, slots, 50)
    first, second = ([(plan.slot.job.slot_name, plan.examples) for plan in planner.plan(slots, 50)] for _ in range(2))
    assert first == second


@settings(max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=12), min_size=1, max_size=4),
    budget=st.integers(1, 120),
    shares=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=4, max_size=4),
)
def test_every_step_makes_progress_within_its_budget_or_by_one_example_and_takes_them_in_order(
    lengths: list[list[int]], budget: int, shares: list[float]
) -> None:
    slots = [
        slot_of(str(number), of_one, share=share, batch_size=5)
        for number, (of_one, share) in enumerate(zip(lengths, shares, strict=False))
    ]
    planner = Planner()
    for _ in range(20):
        waiting = {slot.job.slot_name: slot.waiting() for slot in slots}
        plans = planner.plan(slots, budget)
        assert plans
        is_alone = [len(plan.examples) for plan in plans] == [1]
        assert is_alone or sum(plan.num_tokens for plan in plans) <= budget
        for plan in plans:
            assert plan.examples == waiting[plan.slot.job.slot_name][: len(plan.examples)]
        run_step(planner, slots, budget)


@dataclass(frozen=True)
class Visit:
    """A job that joins before one of the steps, and perhaps leaves two steps later."""

    job: EngineJob
    joins_at: int
    is_short: bool


def make_visit(*, joins_at: int, is_short: bool, seed: int, count: int, longest: int, **changes: Any) -> Visit:
    examples = random_examples(seed, count, low=2, high=longest + 1)
    return Visit(replace(make_job("unnamed", seed=seed, **changes), examples=examples), joins_at, is_short)


a_visit = st.builds(
    make_visit,
    joins_at=st.integers(0, 5),
    is_short=st.booleans(),
    seed=st.integers(10, 1000),
    count=st.integers(1, 6),
    longest=st.sampled_from([3, 12, 32]),
    share=st.sampled_from([0.5, 1.0, 4.0]),
    rank=st.sampled_from([1, 3, 4, 8, 16]),
    alpha=st.sampled_from([4.0, 8.0]),
    dropout=st.sampled_from([0.0, 0.2]),
    n_epochs=st.integers(1, 2),
    batch_size=st.integers(1, 4),
    target_modules=st.sampled_from([("q_proj",), ("gate_proj", "down_proj"), ("o_proj", "k_proj", "v_proj")]),
)


@settings(max_examples=12)
@given(drawn=st.lists(a_visit, min_size=1, max_size=5), max_tokens=st.sampled_from([32, 64, 200]))
def test_any_company_leaves_every_job_on_its_solo_trajectory(drawn: list[Visit], max_tokens: int) -> None:
    visits = {str(number): visit for number, visit in enumerate(drawn)}
    alone, among = make_engine(), make_engine(max_slots=5, max_tokens=max_tokens)
    found: dict[str, list[StepMetrics]] = {name: [] for name in visits}
    for moment in range(8):
        for name, visit in visits.items():
            if visit.joins_at == moment:
                among.admit(replace(visit.job, slot_name=name))
            elif visit.is_short and visit.joins_at + 2 == moment:
                among.evict(name)
        for name, updates in train(among, num_fused_steps=1 if moment < 7 else 1_000_000).items():
            found[name] += updates
    for name, visit in visits.items():
        alone.admit(replace(visit.job, slot_name=name))
        expected = train(alone)[name]
        alone.evict(name)
        if visit.is_short:
            expected = expected[: len(found[name])]
        assert [update.loss for update in found[name]] == pytest.approx([each.loss for each in expected], abs=1e-4)
        norms = [update.grad_norm for update in expected]
        assert [update.grad_norm for update in found[name]] == pytest.approx(norms, rel=1e-3, abs=1e-5)
