"""A slot's state on disk: what training resumes from, in safetensors and JSON.

Gradients are not saved. A state captured in the middle of an optimizer batch resumes at the batch's beginning. When the
format changes, the previous format is read for one more release, so that an upgrade costs no job a step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.domain.training import TrainingSpec
from worker.engine.banks import Layout
from worker.engine.errors import InvalidJobError, UnreadableStateError
from worker.engine.slots import Slot

TENSORS_FILE, CURSOR_FILE = "slot_state.safetensors", "slot_state.json"
_FORMAT = "espalier-slot-2"  # format 2: the As of siblings are adjacent
_FORMAT_BEFORE = "espalier-slot-1"
_VECTORS = ("weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class SlotState:
    """A slot as it stood at one moment, copied off the device."""

    tensors: dict[str, Tensor]
    cursor: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.cursor["step"])

    def write(self, directory: Path) -> None:
        """Write both files. Safe on any thread."""
        save_file(self.tensors, directory / TENSORS_FILE)
        (directory / CURSOR_FILE).write_text(json.dumps(self.cursor), encoding="utf-8")


def capture_state(slot: Slot) -> SlotState:
    row = slot.row
    tensors = {"weights": row.weights_P, "exp_avg": row.exp_avg_P, "exp_avg_sq": row.exp_avg_sq_P}
    cursor = {
        "format": _FORMAT,
        "step": slot.cursor.step,
        "num_updates": row.num_updates,
        "num_skipped_in_a_row": slot.num_skipped_in_a_row,
        "spec": slot.job.spec.model_dump(mode="json"),
        "num_examples": slot.cursor.num_examples,
    }
    return SlotState({name: tensor.cpu().clone() for name, tensor in tensors.items()}, cursor)


def read_cursor(directory: Path) -> dict[str, Any]:
    """Return a saved state's place in its training. Raises UnreadableStateError for an unknown format."""
    cursor: dict[str, Any] = json.loads((directory / CURSOR_FILE).read_text(encoding="utf-8"))
    if cursor.get("format") not in (_FORMAT, _FORMAT_BEFORE):
        raise UnreadableStateError(
            f"It is of format {cursor.get('format')}, which another version of Espalier wrote; "
            f"this one reads {_FORMAT} and {_FORMAT_BEFORE}."
        )
    return cursor


def load_state(slot: Slot, directory: Path) -> int:
    """Resume the slot from a saved state, and return its step. All of it is checked before anything is changed.

    Raises InvalidJobError when it belongs to another job, UnreadableStateError for an unknown format.
    """
    row, cursor = slot.row, read_cursor(directory)
    tensors = load_file(directory / TENSORS_FILE)
    is_same_data = cursor["num_examples"] == slot.cursor.num_examples
    is_same_shape = all(tensors[name].shape == row.weights_P.shape for name in _VECTORS)
    if not (is_same_data and is_same_shape and _has_spec(cursor, slot.job.spec)):
        raise InvalidJobError("The saved state belongs to another job: its spec, data or base model differs.")
    if cursor["format"] == _FORMAT_BEFORE:
        tensors = {name: _let_siblings_follow(row.bank.layout, tensors[name]) for name in _VECTORS}
    row.weights_P.copy_(tensors["weights"])
    row.exp_avg_P.copy_(tensors["exp_avg"])
    row.exp_avg_sq_P.copy_(tensors["exp_avg_sq"])
    slot.cursor.step, row.num_updates = cursor["step"], cursor["num_updates"]
    slot.num_skipped_in_a_row = cursor["num_skipped_in_a_row"]
    slot.restart_batch()
    return slot.cursor.step


def _has_spec(cursor: dict[str, Any], spec: TrainingSpec) -> bool:
    """Return whether a state was saved under exactly this spec.

    Any difference matters: with another batch size, for example, the same step is another place in the data. A field
    that was added to specs after the state was written counts with its default.
    """
    try:
        return TrainingSpec.model_validate(cursor["spec"]) == spec
    except ValidationError:
        return False


def _let_siblings_follow(layout: Layout, numbers_P: Tensor) -> Tensor:
    """Return a row of the previous format in today's order. There each linear's A came directly before its B."""
    arranged_P, start = torch.empty_like(numbers_P), 0
    for columns in layout.columns.values():
        for matrix in columns:
            end = start + matrix.stop - matrix.start
            arranged_P[matrix] = numbers_P[start:end]
            start = end
    return arranged_P
