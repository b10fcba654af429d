"""The fused step: every admitted job's next examples in one packed stream, one forward, one backward.

Invariants: a job's loss is the mean over its whole optimizer batch, however the batch is cut into steps; no gradient
counts before the backward that made it has succeeded; no row of one job is ever combined with a row of another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from worker.engine.adapters import export_adapter, import_adapter
from worker.engine.attention import IMPLEMENTATION
from worker.engine.bases import freeze_base, inspect_base
from worker.engine.errors import DivergedError, InvalidJobError, JobTooLargeError, NoFreeSlotError
from worker.engine.examples import EngineJob, Evaluation, Example, SlotReport, StepMetrics
from worker.engine.linears import FusedLinear, SlotRows, StepContext
from worker.engine.losses import RowLosses, cross_entropy
from worker.engine.optimizers import update_weights
from worker.engine.packing import GroupExamples, PackedBatch, pack
from worker.engine.planner import SlotPlan, plan_step
from worker.engine.slots import Slot
from worker.engine.states import load_state, save_state

log = structlog.get_logger()
MAX_SKIPPED_STEPS = 3
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
        self._max_rank = max_rank
        self._max_tokens_per_step = max_tokens_per_step
        self._budget_tokens = max_tokens_per_step
        self._decoder: nn.Module = model.base_model
        self._head: nn.Linear = model.get_output_embeddings()
        self._device = self._head.weight.device
        self._context = StepContext(self._device)
        self._slots: dict[str, Slot] = {}
        self._num_admitted = 0
        for name in self._shape.linears:
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, FusedLinear(getattr(owner, child), name, self._context))

    @property
    def job_ids(self) -> tuple[str, ...]:
        return tuple(self._slots)

    @property
    def num_free_slots(self) -> int:
        return self._max_slots - len(self._slots)

    def admit(self, job: EngineJob) -> None:
        """Give a job a slot. Raises NoFreeSlotError, or InvalidJobError naming what does not fit this base.

        Raises ValueError when the share is not positive.
        """
        if not job.share > 0:
            raise ValueError(f"A job's share must be above 0, not {job.share}.")
        if not self.num_free_slots:
            raise NoFreeSlotError(f"All {self._max_slots} slots are taken.")
        self._check(job)
        self._num_admitted += 1
        try:
            self._slots[job.job_id] = Slot(job, self._shape, index=self._num_admitted, device=self._device)
        except torch.OutOfMemoryError:
            raise NoFreeSlotError("The device has no memory for another slot of this rank.") from None

    def evict(self, job_id: str) -> None:
        """Take a job out and leave no trace of it; what it held, and what its length cost the others, is given back."""
        self._slots.pop(job_id).scrub()
        self._budget_tokens = self._max_tokens_per_step

    def step(self) -> tuple[SlotReport, ...]:
        """Train on one token budget's worth of examples of all jobs. Empty when no job has work left."""
        while plans := plan_step(tuple(self._slots.values()), self._budget_tokens):
            try:
                batch = self._pack(plans)
                grads = [torch.zeros_like(plan.slot.weights_P) for plan in plans]
                losses = self._forward_backward(plans, batch, grads)
            except torch.OutOfMemoryError:
                is_too_large = sum(len(plan.example_indices) for plan in plans) == 1
            else:
                for plan, grads_P in zip(plans, grads, strict=True):
                    plan.slot.add_grads(grads_P)
                return self._commit(plans, batch, losses)
            # Out of the except clause, whose traceback would keep the failed step's activations alive.
            if is_too_large:
                return (_report(plans[0], JobTooLargeError(_ONE_EXAMPLE_TOO_LARGE)),)
            self._halve_budget(sum(plan.num_tokens for plan in plans))
        return ()

    def evaluate(self, job_id: str, examples: Sequence[Example]) -> Evaluation:
        """Return the job's loss and accuracy on other examples: no dropout, nothing of its training changes.

        Raises InvalidJobError for examples that `admit` would refuse.
        """
        if not examples:
            raise InvalidJobError("There is no example to evaluate on.")
        for example in examples:
            self._check_example(example)
        slot = self._slots[job_id]
        scored = [losses for chunk in _cut(examples, self._budget_tokens) for losses in self._score(slot, chunk)]
        num_labels = sum(len(losses.losses_M) for losses in scored)
        loss_sum = sum(float(losses.weighted_sum) for losses in scored)
        num_right = sum(int(losses.is_right_M.sum()) for losses in scored)
        return Evaluation(loss_sum / num_labels, num_right / num_labels, num_labels)

    def export_adapter(self, job_id: str, directory: Path) -> None:
        """Write the job's adapter as it is now in PEFT's format."""
        export_adapter(self._slots[job_id], directory, base_model_id=self._base_model_id)

    def import_adapter(self, job_id: str, directory: Path) -> None:
        """Start the job from an adapter in PEFT's format."""
        import_adapter(self._slots[job_id], directory)

    def save_state(self, job_id: str, directory: Path) -> None:
        save_state(self._slots[job_id], directory)

    def load_state(self, job_id: str, directory: Path) -> None:
        load_state(self._slots[job_id], directory)

    def _pack(self, plans: list[SlotPlan]) -> PackedBatch:
        parts = [
            GroupExamples(
                plan.slot.index,
                [plan.slot.job.examples[index] for index in plan.example_indices],
                [plan.slot.dropout_key(index) for index in plan.example_indices],
            )
            for plan in plans
        ]
        return pack(parts, self._device)

    def _score(self, slot: Slot, examples: Sequence[Example]) -> list[RowLosses]:
        """Score examples in one forward, or in halves where one does not fit. Raises JobTooLargeError."""
        try:
            batch = pack([GroupExamples(slot.index, examples, [0] * len(examples))], self._device)
            with torch.no_grad():
                weights_M = torch.ones(len(batch.labels_M), device=self._device)
                return [self._forward(batch, (SlotRows(slot, batch.groups[0], None),), weights_M)]
        except torch.OutOfMemoryError:
            middle = len(examples) // 2
        if not middle:
            raise JobTooLargeError(_ONE_EXAMPLE_TOO_LARGE)
        return self._score(slot, examples[:middle]) + self._score(slot, examples[middle:])

    def _forward_backward(self, plans: list[SlotPlan], batch: PackedBatch, grads: list[Tensor]) -> RowLosses:
        rows = zip(plans, batch.groups, grads, strict=True)
        parts = tuple(SlotRows(plan.slot, group, plan.slot.view(grads_P)) for plan, group, grads_P in rows)
        weights = [1 / sum(example.num_labels for example in plan.slot.batch_examples()) for plan in plans]
        counts = [group.label_end - group.label_start for group in batch.groups]
        weights_M = torch.repeat_interleave(torch.tensor(weights), torch.tensor(counts)).to(self._device)
        losses = self._forward(batch, parts, weights_M)
        losses.weighted_sum.backward()
        return losses

    def _forward(self, batch: PackedBatch, parts: tuple[SlotRows, ...], weights_M: Tensor) -> RowLosses:
        self._context.parts = parts
        try:
            output = self._decoder(
                input_ids=batch.token_ids_1T,
                position_ids=batch.positions_1T,
                use_cache=False,
                sequences=batch.sequences,
            )
        finally:
            self._context.parts = ()
        hidden_ME = output.last_hidden_state[0][batch.label_rows_M]
        return cross_entropy(hidden_ME, batch.labels_M, weights_M, self._head)

    def _commit(self, plans: list[SlotPlan], batch: PackedBatch, losses: RowLosses) -> tuple[SlotReport, ...]:
        """Add up what the step has found, and update the slots whose optimizer batch is complete."""
        counted = [
            torch.stack(
                [
                    losses.losses_M[group.label_start : group.label_end].sum(),
                    losses.is_right_M[group.label_start : group.label_end].sum(),
                    torch.linalg.vector_norm(plan.slot.grads_P),
                ]
            )
            for plan, group in zip(plans, batch.groups, strict=True)
        ]
        numbers = torch.stack(counted).tolist()  # the one read that waits for the device
        reports = []
        for plan, (loss_sum, num_right, grad_norm) in zip(plans, numbers, strict=True):
            tally = plan.slot.tally
            tally.position += len(plan.example_indices)
            tally.loss_sum += loss_sum
            tally.num_right += int(num_right)
            tally.num_tokens += plan.num_tokens
            is_complete = tally.position == len(plan.slot.batch_indices())
            reports.append(self._update(plan, grad_norm) if is_complete else _report(plan))
        return tuple(reports)

    def _update(self, plan: SlotPlan, grad_norm: float) -> SlotReport:
        slot = plan.slot
        num_labels = sum(example.num_labels for example in slot.batch_examples())
        is_skipped = not (math.isfinite(grad_norm) and math.isfinite(slot.tally.loss_sum))
        learning_rate = 0.0 if is_skipped else update_weights(slot, grad_norm=grad_norm)
        slot.num_skipped_in_a_row = slot.num_skipped_in_a_row + 1 if is_skipped else 0
        tally = slot.tally
        slot.advance()
        update = StepMetrics(
            step=slot.step,
            total_steps=slot.total_steps,
            epoch=slot.step / slot.steps_per_epoch,
            loss=tally.loss_sum / num_labels,
            token_accuracy=tally.num_right / num_labels,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            num_tokens=tally.num_tokens,
            num_label_tokens=num_labels,
            is_epoch_end=slot.step % slot.steps_per_epoch == 0,
            is_last=slot.is_finished,
            is_skipped=is_skipped,
        )
        failure = None
        if slot.num_skipped_in_a_row >= MAX_SKIPPED_STEPS:
            failure = DivergedError(
                f"The gradient was not finite in {MAX_SKIPPED_STEPS} steps in a row. Lower the learning rate."
            )
        return SlotReport(slot.job.job_id, plan.num_tokens, update=update, failure=failure)

    def _halve_budget(self, num_tokens: int) -> None:
        """Answer a step of `num_tokens` that ran out of memory: nothing of it counts, its examples come again."""
        self._budget_tokens = max(1, min(self._budget_tokens, num_tokens) // 2)
        log.warning("engine.budget_halved", budget_tokens=self._budget_tokens)

    def _check(self, job: EngineJob) -> None:
        adapter = job.spec.adapter
        if job.job_id in self._slots:
            raise InvalidJobError(f"{job.job_id} is admitted already.")
        if adapter.rank > self._max_rank:
            raise InvalidJobError(f"Rank {adapter.rank} is above this worker's {self._max_rank}.")
        lacking = set(adapter.target_modules) - set(self._shape.target_modules)
        if lacking:
            raise InvalidJobError(
                f"The base has no {', '.join(sorted(lacking))}; it has {', '.join(self._shape.target_modules)}."
            )
        if not job.examples:
            raise InvalidJobError("There is no example to learn from.")
        for example in job.examples:
            self._check_example(example)

    def _check_example(self, example: Example) -> None:
        # On the host, before anything is packed: one assertion on a device ends every tenant's job.
        if len(example.token_ids) != len(example.is_label) or not example.num_labels:
            raise InvalidJobError("An example has nothing to learn.")
        if example.num_tokens > self._max_tokens_per_step:
            raise InvalidJobError(
                f"An example has {example.num_tokens} tokens; this worker takes {self._max_tokens_per_step} a step."
            )
        if example.token_ids.min() < 0 or example.token_ids.max() >= self._shape.vocab_size:
            raise InvalidJobError("An example has a token id outside the base's vocabulary.")


def _report(plan: SlotPlan, failure: JobTooLargeError | None = None) -> SlotReport:
    return SlotReport(plan.slot.job.job_id, plan.num_tokens, failure=failure)


def _cut(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """Cut examples into runs of at most `max_tokens` tokens each."""
    chunks: list[list[Example]] = [[]]
    num_tokens = 0
    for example in examples:
        if chunks[-1] and num_tokens + example.num_tokens > max_tokens:
            chunks.append([])
            num_tokens = 0
        chunks[-1].append(example)
        num_tokens += example.num_tokens
    return chunks
