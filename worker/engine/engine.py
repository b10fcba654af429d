"""The fused step: every admitted job's next examples in one packed stream, one forward, one backward.

Invariants: a job's loss is the mean over its whole optimizer batch, however the batch is cut into steps; a step that
failed leaves nothing behind but its batches begun anew; no row of one job is ever combined with a row of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from worker.engine.adapters import export_adapter, import_adapter
from worker.engine.attention import IMPLEMENTATION
from worker.engine.banks import BYTES_PER_PARAMETER, Bank, Layout
from worker.engine.bases import freeze_base, inspect_base, recompute_layers
from worker.engine.errors import DivergedError, ExampleTooLargeError, InvalidJobError, JobTooLargeError, NoFreeSlotError
from worker.engine.evaluations import PendingEvaluation, Score
from worker.engine.examples import DrawnExample, EngineJob, Example, SlotReport
from worker.engine.frozen import Scratch, freeze_linear
from worker.engine.limits import JobLimits
from worker.engine.linears import FusedLinear, Siblings
from worker.engine.losses import Head, RowLosses, cross_entropy, loss_bytes
from worker.engine.memory import DeviceMemory, StepCost, measure_activations, probe_example, probe_job
from worker.engine.norms import freeze_norms
from worker.engine.optimizers import AdamW
from worker.engine.packing import PackedBatch, pack
from worker.engine.planner import Planner, SlotPlan
from worker.engine.runs import SlotRows, make_runs, stream_order
from worker.engine.slots import Slot
from worker.engine.states import SlotState, capture_state, load_state
from worker.engine.steps import StepContext, StepGivenUpError
from worker.engine.updates import SlotSums, complete_batch, read_sums

log = structlog.get_logger()
# Room for every slot at this rank on all linears is kept when the recomputed layers are chosen, once and for all: what
# they leave is all that slots will ever have. It is what most jobs ask for at most; with max_rank's, a worker that
# allows for one large job would compute layers twice for ever.
_USUAL_RANK = 16
# Steps that were shortened are twice as long again after so many in a row that would still have been quick enough.
_BRISK_STEPS = 100
_ONE_EXAMPLE_TOO_LARGE = "One example alone does not fit the device; lower max_seq_len."


class Engine:
    """Holds the base model and the slots. Not safe for use by several threads at once."""

    def __init__(
        self, model: Any, *, base_model_id: str, max_slots: int, max_rank: int, max_tokens_per_step: int
    ) -> None:
        self._shape = inspect_base(model)
        freeze_base(model)
        model.set_attn_implementation(IMPLEMENTATION)
        self._base_model_id = base_model_id
        self._max_slots = max_slots
        self._limits = JobLimits(self._shape, max_rank=max_rank, max_tokens=max_tokens_per_step)
        self._configured_tokens_per_step = self._max_tokens_per_step = max_tokens_per_step
        self._budget_tokens = max_tokens_per_step
        self._num_brisk_steps = 0
        self._decoder: nn.Module = model.base_model
        self._head = Head(model.get_output_embeddings())
        self._device = self._head.rows_VE.device
        self._context = StepContext(self._device)
        self._optimizer = AdamW(self._device)
        self._planner = Planner()
        self._slots: dict[str, Slot] = {}
        scratch: Scratch = {}
        for names in self._shape.siblings:
            weights = [freeze_linear(model.get_submodule(name), scratch) for name in names]
            siblings = Siblings(names, weights, self._context)
            for name in names:
                model.set_submodule(name, FusedLinear(name, siblings))
        freeze_norms(model)
        self._memory = DeviceMemory(self._device)
        self._cost = self._measure_cost()
        left_bytes = self._usable_bytes - max_slots * self._usual_slot_bytes(max_rank)
        self._num_recomputed = self._cost.choose_recomputed(max_tokens_per_step, usable_bytes=left_bytes)
        recompute_layers(model, self._num_recomputed)

    @property
    def job_ids(self) -> tuple[str, ...]:
        return tuple(self._slots)

    @property
    def is_idle(self) -> bool:
        """Whether no job wants a step."""
        return all(slot.is_resting for slot in self._slots.values())

    @property
    def num_free_slots(self) -> int:
        return self._max_slots - len(self._slots)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def flops_per_token(self) -> float:
        """The FLOP that training one token costs the base's products: two a weight forward, and two backward."""
        num_weights = sum(k * n for k, n in self._shape.linears.values()) + self._head.rows_VE.numel()
        return 4.0 * num_weights

    @property
    def running_ids(self) -> Collection[str]:
        """The jobs whose examples are on the device now; none outside of `look`."""
        return [slot.job.job_id for slot in self._context.slots]

    def admit(self, job: EngineJob) -> None:
        """Give a job a slot. Raises NoFreeSlotError when it must wait until another has left.

        Raises InvalidJobError or JobTooLargeError naming what does not fit this base or this device, ValueError when
        the share is not positive.
        """
        assert not self._context.is_under_way, "rows do not move within a step"
        if not self.num_free_slots:
            raise NoFreeSlotError(f"All {self._max_slots} slots are taken.")
        if job.job_id in self._slots:
            raise InvalidJobError(f"{job.job_id} is admitted already.")
        self._limits.check_terms(job)
        adapter = job.spec.adapter
        layout = Layout.of(self._shape, rank=adapter.rank, target_modules=adapter.target_modules)
        self._check_memory(layout)
        # Last, for it reads every token: who waits for memory asks again at every step.
        self._limits.check_examples(job.examples)
        try:
            slot = Slot(job, self._bank_of(layout))
        except torch.OutOfMemoryError:
            raise NoFreeSlotError("The device has no memory for another slot of this rank.") from None
        served = [other.served_tokens for other in self._slots.values() if other.job.tenant == job.tenant]
        slot.served_tokens = min(served, default=0)
        self._slots[job.job_id] = slot

    def evict(self, job_id: str) -> None:
        """Take a job out and leave no trace of it; what it held, and what its length cost the others, is given back.

        Within a step, which is where `look` is called, the job's row is removed at the step's end.
        """
        self._context.leave(self._slots.pop(job_id))
        self._budget_tokens = self._max_tokens_per_step

    def begin_evaluation(self, job_id: str, examples: Sequence[Example]) -> None:
        """Let the coming steps score the job on other examples, before it trains on: no dropout, nothing changes.

        The report of the last of those steps carries the evaluation. Raises InvalidJobError for examples that `admit`
        would refuse.
        """
        self._limits.check_examples(examples)
        self._slots[job_id].evaluation = PendingEvaluation(examples)

    def rest(self, job_id: str) -> None:
        """Pass the job over in the coming steps, until `end_rest`. It keeps its slot."""
        self._slots[job_id].is_resting = True

    def end_rest(self, job_id: str) -> None:
        self._slots[job_id].is_resting = False

    def step(self, *, look: Callable[[], None] = lambda: None) -> tuple[SlotReport, ...]:
        """Train on one token budget's worth of examples of all jobs, and score one's worth of those evaluated.

        Empty when no job has work left. `look` is called between any two products, and may capture states and evict
        jobs; of those, too, it is reported what the step did. What is under way is given up when all who are in it
        have been evicted, or the first of them for longer than steps.PATIENCE_SECONDS. Then the others' batches come
        again, in steps half as long, so that this happens seldom; they grow again as _lengthen_steps says.
        """
        with self._context.under_way(look):
            scored = self._evaluate()
            trained = self._train(scored)
        self._lengthen_steps(sum(report.num_tokens for report in trained))
        for slot in self._slots.values():
            # Not before: its caller wants to see the weights that were judged.
            if slot.evaluation is not None and slot.evaluation.is_complete:
                slot.evaluation = None
        return trained + scored

    def export_adapter(self, job_id: str, directory: Path) -> None:
        """Write the job's adapter as it is now in PEFT's format."""
        export_adapter(self._slots[job_id].row, directory, base_model_id=self._base_model_id)

    def import_adapter(self, job_id: str, directory: Path) -> None:
        """Start the job from an adapter in PEFT's format."""
        slot = self._slots[job_id]
        import_adapter(slot.row, directory)
        slot.restart_batch()

    def capture_state(self, job_id: str) -> SlotState:
        """Copy what the job's training resumes from, to be written at leisure."""
        return capture_state(self._slots[job_id])

    def load_state(self, job_id: str, directory: Path) -> int:
        """Go on from a written state, and return its step. Raises InvalidJobError when it is another job's."""
        return load_state(self._slots[job_id], directory)

    def _train(self, scored: tuple[SlotReport, ...]) -> tuple[SlotReport, ...]:
        while plans := self._plan():
            is_given_up = False
            try:
                batch = self._pack(plans)
                sums = read_sums([plan.slot for plan in plans], batch, self._forward_backward(plans, batch))
            except torch.OutOfMemoryError:
                pass
            except StepGivenUpError:
                is_given_up = True
            else:
                return self._commit(plans, sums, scored)
            # Out of the except clause, whose traceback would keep the failed step's activations alive.
            for plan in plans:
                plan.slot.restart_batch()
            if is_given_up:
                self._shorten_steps(plans)
                return ()
            if len(plans) == 1 and len(plans[0].examples) == 1:
                return (_report(plans[0], failure=ExampleTooLargeError(_ONE_EXAMPLE_TOO_LARGE)),)
            self._halve_budget(plans)
        return ()

    def _evaluate(self) -> tuple[SlotReport, ...]:
        """Score the next part of the evaluation that has waited longest."""
        slot = next((slot for slot in self._slots.values() if slot.evaluation is not None), None)
        if slot is None or slot.evaluation is None:
            return ()
        job_id, evaluation = slot.job.job_id, slot.evaluation
        self._slots[job_id] = self._slots.pop(job_id)  # the others come first next time
        part = evaluation.next_part(self._budget_tokens)
        try:
            evaluation.count(part, self._score(slot, part))
        except JobTooLargeError as error:
            return (SlotReport(job_id, failure=error),)
        except StepGivenUpError:
            return ()
        num_tokens = sum(example.num_tokens for example in part)
        if not evaluation.is_complete:
            return (SlotReport(job_id, num_scored_tokens=num_tokens),)
        result = evaluation.result()
        failure = None if math.isfinite(result.loss) else DivergedError("The validation loss is not finite.")
        return (SlotReport(job_id, num_scored_tokens=num_tokens, evaluation=result, failure=failure),)

    def _plan(self) -> list[SlotPlan]:
        plans = self._planner.plan(tuple(self._slots.values()), self._budget_tokens)
        return sorted(plans, key=lambda plan: stream_order(plan.slot))

    def _pack(self, plans: list[SlotPlan]) -> PackedBatch:
        return pack([plan.examples for plan in plans], self._device)

    def _forward_backward(self, plans: list[SlotPlan], batch: PackedBatch) -> RowLosses:
        self._memory.begin_step()
        parts = [SlotRows(plan.slot, group) for plan, group in zip(plans, batch.groups, strict=True)]
        weights = [1 / sum(drawn.example.num_labels for drawn in plan.slot.cursor.batch()) for plan in plans]
        counts = [group.label_end - group.label_start for group in batch.groups]
        weights_M = torch.repeat_interleave(torch.tensor(weights), torch.tensor(counts)).to(self._device)
        # The runs stay until after the backward, which computes some layers again.
        with self._context.running(make_runs(parts, is_grouped=self._device.type == "cuda")):
            losses = self._forward(batch, weights_M)
            losses.weighted_sum.backward()
        self._memory.end_step(self._predict(batch.token_ids_1T.shape[1]))
        return losses

    def _forward(self, batch: PackedBatch, weights_M: Tensor) -> RowLosses:
        hidden_ME = self._decode(batch)[batch.label_rows_M]
        return cross_entropy(hidden_ME, batch.labels_M, weights_M, self._head, pause=self._context.pause)

    def _decode(self, batch: PackedBatch) -> Tensor:
        """Return the last hidden state [T, E]."""
        output = self._decoder(
            input_ids=batch.token_ids_1T,
            position_ids=batch.positions_1T,
            use_cache=False,
            sequences=batch.sequences,
        )
        hidden_TE: Tensor = output.last_hidden_state[0]
        return hidden_TE

    def _score(self, slot: Slot, examples: Sequence[Example]) -> list[Score]:
        """Score examples in one forward, or in halves where one does not fit. Raises JobTooLargeError."""
        try:
            batch = pack([[DrawnExample(example, 0) for example in examples]], self._device)
            runs = make_runs([SlotRows(slot, batch.groups[0], is_training=False)], is_grouped=False)
            with torch.no_grad(), self._context.running(runs):
                return [Score.of(self._forward(batch, torch.ones(len(batch.labels_M), device=self._device)))]
        except torch.OutOfMemoryError:
            middle = len(examples) // 2
        if not middle:
            raise ExampleTooLargeError(_ONE_EXAMPLE_TOO_LARGE)
        return self._score(slot, examples[:middle]) + self._score(slot, examples[middle:])

    def _commit(
        self, plans: list[SlotPlan], sums: list[SlotSums], scored: tuple[SlotReport, ...]
    ) -> tuple[SlotReport, ...]:
        """Add up what the step has found, and update the slots whose optimizer batch is complete. Takes no memory."""
        slots = tuple(self._slots.values())
        tenants = {slot.job.job_id: slot.job.tenant for slot in slots}
        costs = {tenants[report.job_id]: report.cost_tokens for report in scored if report.job_id in tenants}
        staying = [plan for plan in plans if plan.slot.evicted_at is None]
        self._planner.charge(staying, slots, self._budget_tokens, scored=costs)
        reports = []
        for plan, found in zip(plans, sums, strict=True):
            slot, num_examples = plan.slot, len(plan.examples)
            slot.count(
                num_examples=num_examples,
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

    def _halve_budget(self, plans: list[SlotPlan]) -> None:
        """Answer a step that ran out of memory: its batches come again, in smaller steps."""
        self._budget_tokens = max(1, min(self._budget_tokens, sum(plan.num_tokens for plan in plans)) // 2)
        log.warning("engine.budget_halved", budget_tokens=self._budget_tokens)

    def _shorten_steps(self, plans: list[SlotPlan]) -> None:
        """Answer a step that was given up with others in it: let none be so long again on this device."""
        if any(plan.slot.evicted_at is None for plan in plans):
            self._halve_budget(plans)
            self._max_tokens_per_step = self._budget_tokens
            self._num_brisk_steps = 0

    def _lengthen_steps(self, num_tokens: int) -> None:
        """Double shortened steps after many that were quick: what made one slow does not last as long as a trainer.

        Only steps that were half full or more count, for a short one does not show how long a full one takes.
        """
        if self._max_tokens_per_step == self._configured_tokens_per_step:
            return
        if not self._context.was_brisk:
            self._num_brisk_steps = 0
        elif 2 * num_tokens >= self._budget_tokens:
            self._num_brisk_steps += 1
        if self._num_brisk_steps < _BRISK_STEPS:
            return
        self._num_brisk_steps = 0
        is_short_of_memory = self._budget_tokens < self._max_tokens_per_step
        self._max_tokens_per_step = min(2 * self._max_tokens_per_step, self._configured_tokens_per_step)
        if not is_short_of_memory:
            self._budget_tokens = self._max_tokens_per_step
        log.info("engine.steps_lengthened", max_tokens_per_step=self._max_tokens_per_step)

    @property
    def _banks(self) -> Collection[Bank]:
        return {slot.row.bank.index: slot.row.bank for slot in self._slots.values()}.values()

    def _bank_of(self, layout: Layout) -> Bank:
        """Return the bank of a layout. A new one is known to nobody until a slot has a row of it."""
        index = max((bank.index for bank in self._banks), default=0) + 1
        return next((bank for bank in self._banks if bank.layout == layout), None) or Bank(layout, index, self._device)

    def _check_memory(self, layout: Layout) -> None:
        """Refuse a slot that would leave a full step too little. Raises NoFreeSlotError, JobTooLargeError."""
        needed = layout.num_parameters * BYTES_PER_PARAMETER + self._predict(self._budget_tokens)
        usable = self._usable_bytes
        if needed > usable and self._slots:
            raise NoFreeSlotError("The device has no memory for another slot of this rank.")
        if needed > usable:
            raise JobTooLargeError(
                f"The job needs about {needed / 2**20:.0f} MiB beside the base, and {usable / 2**20:.0f} MiB are free; "
                "lower the rank."
            )

    def _measure_cost(self) -> StepCost:
        """Count what autograd keeps of a forward with an adapter on every linear."""
        layout = Layout.of(self._shape, rank=1, target_modules=self._shape.target_modules)
        slot = Slot(probe_job(self._shape.target_modules), Bank(layout, 0, self._device))

        def run_decoder(num_tokens: int) -> Tensor:
            batch = pack([[DrawnExample(probe_example(num_tokens), 0)]], self._device)
            with self._context.running(make_runs([SlotRows(slot, batch.groups[0])], is_grouped=False)):
                return self._decode(batch)

        return StepCost(
            activation_bytes=measure_activations(run_decoder),
            border_bytes=self._shape.hidden_size * self._head.rows_VE.element_size(),
            loss_bytes=loss_bytes(self._shape.vocab_size, self._device),
            num_layers=self._shape.num_layers,
        )

    def _usual_slot_bytes(self, max_rank: int) -> int:
        rank = min(_USUAL_RANK, max_rank)
        layout = Layout.of(self._shape, rank=rank, target_modules=self._shape.target_modules)
        return layout.num_parameters * BYTES_PER_PARAMETER

    @property
    def _usable_bytes(self) -> float:
        return self._memory.usable_bytes

    def _predict(self, num_tokens: int) -> int:
        return self._cost.predict(num_tokens, num_recomputed=self._num_recomputed)


def _report(plan: SlotPlan, *, failure: JobTooLargeError | None = None) -> SlotReport:
    return SlotReport(plan.slot.job.job_id, plan.num_tokens, failure=failure)
