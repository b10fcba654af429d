"""A slot's state on disk: what training resumes from, in safetensors and JSON.

A state saved in the middle of an optimizer batch resumes at that batch's beginning.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.engine.errors import InvalidJobError
from worker.engine.slots import Slot

TENSORS_FILE, CURSOR_FILE = "slot_state.safetensors", "slot_state.json"
_FORMAT = "espalier-slot-2"  # 2: the As of siblings follow each other


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
    tensors = {"weights": slot.weights_P, "exp_avg": slot.exp_avg_P, "exp_avg_sq": slot.exp_avg_sq_P}
    cursor = {
        "format": _FORMAT,
        "step": slot.step,
        "num_updates": slot.num_updates,
        "num_skipped_in_a_row": slot.num_skipped_in_a_row,
        "spec": slot.job.spec.model_dump(mode="json"),
        "num_examples": len(slot.job.examples),
    }
    return SlotState({name: tensor.cpu().clone() for name, tensor in tensors.items()}, cursor)


def load_state(slot: Slot, directory: Path) -> int:
    """Go on from a saved state, and return its step. Raises InvalidJobError when it is another job's or format's."""
    cursor = json.loads((directory / CURSOR_FILE).read_text(encoding="utf-8"))
    if cursor["format"] != _FORMAT:
        raise InvalidJobError(f"The saved state is of format {cursor['format']}, not {_FORMAT}.")
    tensors = load_file(directory / TENSORS_FILE)
    # The whole spec: with another batch size, for one, the same step number is another place in the data.
    is_same_spec = cursor["spec"] == slot.job.spec.model_dump(mode="json")
    is_same_data = cursor["num_examples"] == len(slot.job.examples)
    is_same_shape = all(tensors[name].shape == slot.weights_P.shape for name in ("weights", "exp_avg", "exp_avg_sq"))
    if not (is_same_spec and is_same_data and is_same_shape):
        raise InvalidJobError("The saved state belongs to another job: its spec, data or base model differs.")
    slot.weights_P.copy_(tensors["weights"])
    slot.exp_avg_P.copy_(tensors["exp_avg"])
    slot.exp_avg_sq_P.copy_(tensors["exp_avg_sq"])
    slot.step, slot.num_updates = cursor["step"], cursor["num_updates"]
    slot.num_skipped_in_a_row = cursor["num_skipped_in_a_row"]
    slot.restart_batch()
    return slot.step
