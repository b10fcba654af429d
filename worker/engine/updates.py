"""Reads the results of a fused step off the device once, and makes the update that ends an optimizer batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from core.domain.training import MAX_SKIPPED_STEPS
from worker.engine.errors import DivergedError
from worker.engine.examples import SlotReport, StepMetrics
from worker.engine.objectives import Sums
from worker.engine.optimizers import AdamW
from worker.engine.slots import Slot


class SlotSums(NamedTuple):
    """Sums over a slot's examples of one fused step, and the norm of its gradients so far."""

    loss_sum: float
    num_right: float
    grad_norm: float


def read_sums(slots: Sequence[Slot], sums: Sequence[Sums]) -> list[SlotSums]:
    """Read each slot's sums, and the norm of its gradients. Raises torch.OutOfMemoryError.

    This is the step's one read that waits for the device.
    """
    found = [
        torch.stack([each.loss, each.num_right, torch.linalg.vector_norm(slot.row.grads_P)])
        for slot, each in zip(slots, sums, strict=True)
    ]
    return [SlotSums(*numbers) for numbers in torch.stack(found).tolist()]


def complete_batch(slot: Slot, optimizer: AdamW, *, grad_norm: float, num_tokens: int) -> SlotReport:
    """Update the slot's weights, unless its gradient is not finite, and start its next optimizer batch.

    A skipped update still counts as a step, so that the data and the learning rate move on. Too many in a row end the
    job: then the report carries the failure.
    """
    is_skipped = not (math.isfinite(grad_norm) and math.isfinite(slot.tally.loss_sum))
    cursor, tally = slot.cursor, slot.tally
    learning_rate = 0.0 if is_skipped else cursor.learning_rate
    if not is_skipped:
        optimizer.update(slot.row, slot.job.spec, learning_rate=learning_rate, grad_norm=grad_norm)
    slot.num_skipped_in_a_row = slot.num_skipped_in_a_row + 1 if is_skipped else 0
    num_units = slot.num_units
    slot.advance()
    update = StepMetrics(
        step=cursor.step,
        total_steps=cursor.total_steps,
        epoch=cursor.step / cursor.steps_per_epoch,
        loss=tally.loss_sum / num_units,
        token_accuracy=tally.num_right / num_units,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        num_tokens=tally.num_tokens,
        num_units=num_units,
        is_epoch_end=cursor.step % cursor.steps_per_epoch == 0,
        is_last=cursor.is_finished,
        is_skipped=is_skipped,
    )
    failure = None
    if slot.num_skipped_in_a_row >= MAX_SKIPPED_STEPS:
        failure = DivergedError(
            f"The gradient was not finite in {MAX_SKIPPED_STEPS} steps in a row. Lower the learning rate."
        )
    return SlotReport(slot.job.slot_name, num_tokens, update=update, failure=failure)
