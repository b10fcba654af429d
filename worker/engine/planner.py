"""Which examples go into the next fused step: deficit round robin (Shreedhar and Varghese 1995) over tenants.

Every tenant has a balance in tokens: above zero it is behind its share, below zero ahead of it. The balances add up to
zero. A step is planned in this order:

1. Every tenant may spend its share of the budget, plus its balance, on its jobs' waiting examples, the least served job
   first.
2. What is left goes to tenants with more waiting examples. It puts them ahead, so they get less later.

A job's examples are taken in order and never beyond its own optimizer batch. An example may be longer than the whole
budget if the budget shrank for lack of memory. Such an example is a step of its own, once its tenant is the furthest
behind; until then its tenant spends nothing. Planning changes nothing, so a failed plan can be made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from worker.engine.examples import DrawnExample
from worker.engine.slots import Slot


class SlotPlan:
    """The examples that one slot puts into a step: the first ones of those that wait."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.num_tokens = 0
        self._waiting = slot.waiting()
        self._num_taken = 0

    @property
    def examples(self) -> list[DrawnExample]:
        return self._waiting[: self._num_taken]

    @property
    def has_waiting(self) -> bool:
        return self._num_taken < len(self._waiting)

    @property
    def next_length(self) -> int:
        """The tokens of the example that would be taken next."""
        return self._waiting[self._num_taken].example.num_tokens

    def take(self) -> int:
        """Take the next example and return its tokens."""
        length = self.next_length
        self._num_taken += 1
        self.num_tokens += length
        return length


class Planner:
    """Keeps each tenant's balance from step to step."""

    def __init__(self) -> None:
        self._balances: dict[str, float] = {}

    def plan(self, slots: Sequence[Slot], budget_tokens: int) -> list[SlotPlan]:
        """Return the step's plan. It is empty when no slot has work; otherwise it has at least one example."""
        plans = [plan for plan in map(SlotPlan, slots) if plan.has_waiting]
        if not plans:
            return []
        tenants = _by_tenant(plans)
        allowed = self._allow(tenants, budget_tokens)
        most_behind_first = sorted(tenants, key=lambda tenant: -allowed[tenant] / _share(tenants[tenant]))
        first = _least_served(tenants[most_behind_first[0]])
        if first.next_length > budget_tokens:
            first.take()
            return [first]
        left = float(budget_tokens)
        # A new job's first example is a loan, so the job does not wait until its tenant has saved enough. A tenant that
        # is a whole step ahead gets no loan, or it could live on loans by submitting short jobs again and again.
        for plan in plans:
            is_lent = plan.slot.num_fused_steps == 0 and self._balances.get(plan.slot.job.tenant, 0.0) > -budget_tokens
            if is_lent and plan.next_length <= left:
                left -= plan.take()
        for tenant in most_behind_first:
            spent = sum(plan.num_tokens for plan in tenants[tenant])
            left -= _spend(tenants[tenant], min(left, allowed[tenant] - spent), budget_tokens)
        # If nothing was taken so far, the whole budget is left and `first` fits into it. So no step is empty.
        for tenant in most_behind_first:
            left -= _spend(tenants[tenant], left, budget_tokens)
        return [plan for plan in plans if plan.num_tokens]

    def charge(
        self, plans: Sequence[SlotPlan], slots: Sequence[Slot], budget_tokens: int, *, scored: Mapping[str, float]
    ) -> None:
        """Book a successful step, and in `scored` the cost of tenants' evaluations.

        Call it before the slots advance: the account depends on which tenants had examples waiting.
        """
        planned = {plan.slot: plan for plan in plans}
        all_plans = [planned.get(slot) or SlotPlan(slot) for slot in slots]
        tenants = _by_tenant(
            plan for plan in all_plans if plan.num_tokens or plan.has_waiting or plan.slot.job.tenant in scored
        )
        balances = self._allow(tenants, sum(plan.num_tokens for plan in plans) + sum(scored.values()))
        for plan in plans:
            balances[plan.slot.job.tenant] -= plan.num_tokens
            plan.slot.served_tokens += plan.num_tokens
        for tenant, cost_tokens in scored.items():
            balances[tenant] -= cost_tokens
        # A tenant that had nothing left to train saves at most one step's budget. The rest of its share belongs to the
        # others. A tenant whose examples still wait could have used its share, and keeps all of its claim.
        for tenant in tenants:
            if not any(plan.has_waiting for plan in tenants[tenant]):
                balances[tenant] = min(balances[tenant], float(budget_tokens))
        surplus, total_share = sum(balances.values()), sum(_share(tenants[tenant]) for tenant in tenants)
        self._balances = {
            tenant: credit - surplus * _share(tenants[tenant]) / total_share for tenant, credit in balances.items()
        }

    def _allow(self, tenants: dict[str, list[SlotPlan]], num_tokens: float) -> dict[str, float]:
        """Return every tenant's balance plus its share of this many tokens."""
        total_share = sum(_share(plans) for plans in tenants.values())
        return {
            tenant: self._balances.get(tenant, 0.0) + num_tokens * _share(plans) / total_share
            for tenant, plans in tenants.items()
        }


def _by_tenant(plans: Iterable[SlotPlan]) -> dict[str, list[SlotPlan]]:
    tenants: dict[str, list[SlotPlan]] = {}
    for plan in plans:
        tenants.setdefault(plan.slot.job.tenant, []).append(plan)
    return tenants


def _share(plans: Sequence[SlotPlan]) -> float:
    return max(plan.slot.job.share for plan in plans)


def _least_served(plans: Sequence[SlotPlan]) -> SlotPlan:
    return min(plans, key=lambda plan: plan.slot.served_tokens + plan.num_tokens)


def _spend(plans: Sequence[SlotPlan], tokens: float, budget_tokens: int) -> int:
    """Take examples of one tenant's jobs while they fit, always the least served job's, and return the tokens taken.

    Stops when the least served job's next example is longer than a step's whole budget: the tenant must save for it.
    """
    open_plans, taken = list(plans), 0
    while open_plans:
        plan = _least_served(open_plans)
        if plan.has_waiting and plan.next_length > budget_tokens:
            break
        if plan.has_waiting and taken + plan.next_length <= tokens:
            taken += plan.take()
        else:
            open_plans.remove(plan)
    return taken
