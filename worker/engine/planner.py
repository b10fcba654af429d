"""Which examples go into the next fused step: deficit round robin (Shreedhar and Varghese 1995) over a token budget.

Every slot earns its share of the budget each step and spends it on the waiting examples of its own optimizer batch, in
order. What nobody's credit covers goes to whoever has ready examples. Nothing is consumed here: a plan that failed can
be made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worker.engine.slots import Slot


@dataclass
class SlotPlan:
    """The examples that one slot puts into a step."""

    slot: Slot
    example_indices: list[int]
    num_tokens: int = 0


def plan_step(slots: Sequence[Slot], budget_tokens: int) -> list[SlotPlan]:
    """Return the step's plan, sorted by slot; empty when no slot has work. At least one example always fits."""
    plans = [SlotPlan(slot, []) for slot in slots if slot.waiting_indices()]
    if not plans:
        return []
    total_share = sum(plan.slot.job.share for plan in plans)
    for plan in plans:
        plan.slot.deficit += budget_tokens * plan.slot.job.share / total_share
    left = budget_tokens
    by_credit = sorted(plans, key=lambda plan: -plan.slot.deficit / plan.slot.job.share)
    for plan in by_credit:
        left -= _take(plan, min(left, plan.slot.deficit))
    for plan in by_credit:
        left -= _take(plan, left)
    if not any(plan.example_indices for plan in plans):
        # A budget halved by want of memory may be smaller than any example: then one goes alone.
        _take_first(by_credit[0])
    for plan in plans:
        # Credit is kept only as far as an example that did not fit may need it.
        plan.slot.deficit = min(max(plan.slot.deficit - plan.num_tokens, -float(budget_tokens)), float(budget_tokens))
    return [plan for plan in plans if plan.example_indices]


def _take(plan: SlotPlan, tokens: float) -> int:
    taken = 0
    waiting = plan.slot.waiting_indices()[len(plan.example_indices) :]
    for index in waiting:
        length = plan.slot.job.examples[index].num_tokens
        if taken + length > tokens:
            break
        plan.example_indices.append(index)
        taken += length
    plan.num_tokens += taken
    return taken


def _take_first(plan: SlotPlan) -> None:
    index = plan.slot.waiting_indices()[0]
    plan.example_indices.append(index)
    plan.num_tokens += plan.slot.job.examples[index].num_tokens
