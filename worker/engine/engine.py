"""The fused step: every admitted job's next examples in one packed stream, one forward, one backward.

A job's loss is the mean over its whole optimizer batch, however the batch is cut into steps. A step that fails changes
nothing, except that its batches start again from their first example. No row of one job is ever combined with a row of
another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from worker.engine.adapters import export_adapter, import_adapter
from worker.engine.banks import Bank, Layout
from worker.engine.bases import recompute_layers
from worker.engine.errors import DivergedError, ExampleTooLargeError, InvalidJobError, JobTooLargeError, NoFreeSlotError
from worker.engine.evaluations import PendingEvaluation, Score
from worker.engine.examples import DrawnExample, EngineJob, Example, SlotReport
from worker.engine.fused_bases import FusedBase
from worker.engine.limits import JobLimits
from worker.engine.memory import MemoryBudget
from worker.engine.objectives import Sums
from worker.engine.optimizers import AdamW
from worker.engine.packing import PackedBatch, pack
from worker.engine.planner import Planner, SlotPlan
from worker.engine.runs import SlotRows, make_runs, stream_order
from worker.engine.slots import Slot
from worker.engine.states import SlotState, capture_state, load_state
from worker.engine.steps import StepGivenUpError
from worker.engine.token_budgets import TokenBudget
from worker.engine.updates import SlotSums, complete_batch, read_sums

_ONE_EXAMPLE_TOO_LARGE = "One example alone does not fit the device; lower max_seq_len."


class Engine:
    """Holds the base model and the slots. Not safe for use by several threads at once."""

    def __init__(
        self, model: Any, *, base_model_id: str, max_slots: int, max_rank: int, max_tokens_per_step: int
    ) -> None:
        self._base = FusedBase(model)
        self._base_model_id = base_model_id
        self._max_slots = max_slots
        self._limits = JobLimits(self._base.shape, max_rank=max_rank, max_tokens=max_tokens_per_step)
        self._context = self._base.context
        self._optimizer = AdamW(self.device)
        self._planner = Planner()
        self._slots: dict[str, Slot] = {}
        self._budget = TokenBudget(max_tokens_per_step)
        self._memory = MemoryBudget(self._base, max_slots=max_slots, max_rank=max_rank, max_tokens=max_tokens_per_step)
        recompute_layers(self._base.decoder, self._memory.num_recomputed)

    @property
    def slot_names(self) -> tuple[str, ...]:
        """The names of the occupied slots, as their jobs' callers chose them."""
        return tuple(self._slots)

    @property
    def is_idle(self) -> bool:
        """Whether no job needs a step."""
        return all(slot.is_resting for slot in self._slots.values())

    @property
    def num_free_slots(self) -> int:
        return self._max_slots - len(self._slots)

    @property
    def device(self) -> torch.device:
        return self._base.device

    @property
    def flops_per_token(self) -> float:
        """The FLOP that training one token costs the base's products: two a weight forward, and two backward."""
        return 4.0 * self._base.num_weights

    @property
    def running_names(self) -> Collection[str]:
        """The names of the slots whose examples are on the device now; none outside of `look`."""
        return [slot.job.slot_name for slot in self._context.slots]

    def admit(self, job: EngineJob) -> None:
        """Give a job a slot. Raises NoFreeSlotError when it must wait until another has left.

        Raises InvalidJobError or JobTooLargeError naming what does not fit this base or this device, ValueError when
        the share is not positive.
        """
        assert not self._context.is_under_way, "rows do not move within a step"
        if not self.num_free_slots:
            raise NoFreeSlotError(f"All {self._max_slots} slots are taken.")
        if job.slot_name in self._slots:
            raise InvalidJobError(f"{job.slot_name} is admitted already.")
        self._limits.check_terms(job)
        adapter = job.spec.adapter
        layout = Layout.of(self._base.shape, rank=adapter.rank, target_modules=adapter.target_modules)
        self._memory.check_slot(layout, step_tokens=self._budget.tokens, is_first=not self._slots)
        # Last, because this reads every token, and a job that waits for memory is admitted again after every step.
        self._limits.check_examples(job.examples)
        try:
            slot = Slot(job, _find_bank(self._slots.values(), layout, self.device))
        except torch.OutOfMemoryError:
            raise NoFreeSlotError("The device has no memory for another slot of this rank.") from None
        served = [other.served_tokens for other in self._slots.values() if other.job.tenant == job.tenant]
        slot.served_tokens = min(served, default=0)
        self._slots[job.slot_name] = slot

    def evict(self, slot_name: str) -> None:
        """Remove a job and all traces of it. Its memory is free again, and the next step has a full budget again.

        During a step, from `look`, the job's row is removed at the step's end.
        """
        self._context.leave(self._slots.pop(slot_name))
        self._budget.restore()

    def begin_evaluation(self, slot_name: str, examples: Sequence[Example]) -> None:
        """Let the coming steps score the job on other examples, without dropout. It does not train until that is done.

        The report of the last of those steps carries the evaluation. Raises InvalidJobError for examples that `admit`
        would refuse.
        """
        self._limits.check_examples(examples)
        self._slots[slot_name].evaluation = PendingEvaluation(examples)

    def rest(self, slot_name: str) -> None:
        """Leave the job out of the coming steps, until `end_rest`. It keeps its slot."""
        self._slots[slot_name].is_resting = True

    def end_rest(self, slot_name: str) -> None:
        self._slots[slot_name].is_resting = False

    def export_adapter(self, slot_name: str, directory: Path) -> None:
        """Write the job's adapter as it is now in PEFT's format."""
        export_adapter(self._slots[slot_name].row, directory, base_model_id=self._base_model_id)

    def import_adapter(self, slot_name: str, directory: Path) -> None:
        """Start the job from an adapter in PEFT's format."""
        slot = self._slots[slot_name]
        import_adapter(slot.row, directory)
        slot.restart_batch()

    def capture_state(self, slot_name: str) -> SlotState:
        """Copy what the job's training resumes from. The copy may be written later, on any thread."""
        return capture_state(self._slots[slot_name])

    def load_state(self, slot_name: str, directory: Path) -> int:
        """Resume from a written state and return its step. Raises InvalidJobError if it belongs to another job."""
        return load_state(self._slots[slot_name], directory)

    def step(self, *, look: Callable[[], None] = lambda: None) -> tuple[SlotReport, ...]:
        """Train on one token budget's worth of all jobs' examples, and score as much of one job's evaluation.

        Returns a report for every job that was in the step, also for one evicted during it; empty when no job has work
        left. `look` is called between any two products, and may capture states and evict jobs. The step is given up
        when all of its jobs were evicted, or when one was evicted more than steps.PATIENCE_SECONDS ago. Then the
        others' batches come again, in steps half as long, so that this happens seldom. TokenBudget.lengthen says when
        steps grow again.
        """
        with self._context.under_way(look):
            # First, so that the planner can book its cost together with that of training.
            scored = self._evaluate()
            trained = self._train(scored)
        self._budget.lengthen(sum(report.num_tokens for report in trained), was_brisk=self._context.was_brisk)
        for slot in self._slots.values():
            # After `_train`, in which this slot rests, so that the caller finds the weights that were evaluated.
            if slot.evaluation is not None and slot.evaluation.is_complete:
                slot.evaluation = None
        return trained + scored

    def _train(self, scored: tuple[SlotReport, ...]) -> tuple[SlotReport, ...]:
        """Train on one plan. If the step runs out of memory, a smaller one is planned, until one fits."""
        while plans := self._plan():
            try:
                batch = pack([plan.examples for plan in plans], self.device)
                sums = read_sums([plan.slot for plan in plans], self._forward_backward(plans, batch))
            except torch.OutOfMemoryError:
                is_given_up = False
            except StepGivenUpError:
                is_given_up = True
            else:
                return self._commit(plans, sums, scored)
            # Outside of the except clause, whose traceback would keep the failed step's activations alive.
            reports = self._begin_anew(plans, is_given_up=is_given_up)
            if reports is not None:
                return reports
        return ()

    def _plan(self) -> list[SlotPlan]:
        plans = self._planner.plan(tuple(self._slots.values()), self._budget.tokens)
        return sorted(plans, key=lambda plan: stream_order(plan.slot))

    def _forward_backward(self, plans: list[SlotPlan], batch: PackedBatch) -> list[Sums]:
        """Add the step's gradients to the slots' own, and return each slot's sums."""
        slots = [plan.slot for plan in plans]
        parts = [SlotRows(slot, group) for slot, group in zip(slots, batch.groups, strict=True)]
        runs = make_runs(parts, is_grouped=self.device.type == "cuda")
        # The runs stay until after the backward, which recomputes some layers.
        with self._memory.measuring(batch.num_tokens), self._context.running(runs):
            rows = self._base.score_labels(batch)
            sums = [slot.objective.sum_units(each) for slot, each in zip(slots, rows, strict=True)]
            # A slot's gradient does not depend on the others' losses. So the backward of their sum replaces one
            # backward a slot.
            means = [each.loss * (1 / slot.num_units) for slot, each in zip(slots, sums, strict=True)]
            torch.stack(means).sum().backward()
        return sums

    def _commit(
        self, plans: list[SlotPlan], sums: list[SlotSums], scored: tuple[SlotReport, ...]
    ) -> tuple[SlotReport, ...]:
        """Add up the results of the step, and update the slots whose optimizer batch is complete.

        It takes no memory on the device and cannot fail. So a step is committed for all of its slots or for none.
        """
        slots = tuple(self._slots.values())
        tenants = {slot.job.slot_name: slot.job.tenant for slot in slots}
        costs = {tenants[report.slot_name]: report.cost_tokens for report in scored if report.slot_name in tenants}
        staying = [plan for plan in plans if plan.slot.evicted_at is None]
        self._planner.charge(staying, slots, self._budget.tokens, scored=costs)
        reports = []
        for plan, found in zip(plans, sums, strict=True):
            slot = plan.slot
            slot.count(
                num_examples=len(plan.examples),
                num_tokens=plan.num_tokens,
                loss_sum=found.loss_sum,
                num_right=found.num_right,
            )
            if slot.cursor.is_batch_complete and slot.evicted_at is None:
                reports.append(
                    complete_batch(slot, self._optimizer, grad_norm=found.grad_norm, num_tokens=plan.num_tokens)
                )
            else:
                reports.append(_report(plan))
        return tuple(reports)

    def _begin_anew(self, plans: list[SlotPlan], *, is_given_up: bool) -> tuple[SlotReport, ...] | None:
        """Forget what a failed step did to its batches. Return its reports, or None where a smaller one may succeed."""
        for plan in plans:
            plan.slot.restart_batch()
        num_tokens = sum(plan.num_tokens for plan in plans)
        if is_given_up:
            if any(plan.slot.evicted_at is None for plan in plans):
                self._budget.shorten(num_tokens)
            return ()
        if len(plans) == 1 and len(plans[0].examples) == 1:
            return (_report(plans[0], failure=ExampleTooLargeError(_ONE_EXAMPLE_TOO_LARGE)),)
        self._budget.halve(num_tokens)
        return None

    def _evaluate(self) -> tuple[SlotReport, ...]:
        """Score the next part of the evaluation that has waited longest."""
        slot = next((slot for slot in self._slots.values() if slot.evaluation is not None), None)
        if slot is None or slot.evaluation is None:
            return ()
        slot_name, evaluation = slot.job.slot_name, slot.evaluation
        self._slots[slot_name] = self._slots.pop(slot_name)  # last in line: other evaluations come first next time
        part = evaluation.next_part(self._budget.tokens)
        try:
            evaluation.count(part, self._score(slot, part))
        except JobTooLargeError as error:
            return (SlotReport(slot_name, failure=error),)
        except StepGivenUpError:
            return ()
        num_tokens = sum(example.num_tokens for example in part)
        if not evaluation.is_complete:
            return (SlotReport(slot_name, num_scored_tokens=num_tokens),)
        result = evaluation.result()
        failure = None if math.isfinite(result.loss) else DivergedError("The validation loss is not finite.")
        return (SlotReport(slot_name, num_scored_tokens=num_tokens, evaluation=result, failure=failure),)

    def _score(self, slot: Slot, examples: Sequence[Example]) -> list[Score]:
        """Score examples in one forward, or in halves where one does not fit. Raises JobTooLargeError."""
        try:
            batch = pack([[DrawnExample(example, 0) for example in examples]], self.device)
            runs = make_runs([SlotRows(slot, batch.groups[0], is_training=False)], is_grouped=False)
            with torch.no_grad(), self._context.running(runs):
                (rows,) = self._base.score_labels(batch)
                sums = slot.objective.sum_units(rows)
                return [Score.of(sums, num_units=slot.objective.count_units(examples))]
        except torch.OutOfMemoryError:
            middle = len(examples) // 2
        if not middle:
            raise ExampleTooLargeError(_ONE_EXAMPLE_TOO_LARGE)
        return self._score(slot, examples[:middle]) + self._score(slot, examples[middle:])


def _find_bank(slots: Iterable[Slot], layout: Layout, device: torch.device) -> Bank:
    """Return the bank of a layout. A new one is found again only once a slot has a row of it."""
    banks = {slot.row.bank for slot in slots}
    index = max((bank.index for bank in banks), default=0) + 1
    return next((bank for bank in banks if bank.layout == layout), None) or Bank(layout, index, device)


def _report(plan: SlotPlan, *, failure: JobTooLargeError | None = None) -> SlotReport:
    return SlotReport(plan.slot.job.slot_name, plan.num_tokens, failure=failure)
