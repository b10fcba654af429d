"""A slot's state on disk: what training resumes from, in safetensors and JSON.

A state saved in the middle of an optimizer batch resumes at that batch's beginning.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from worker.engine.errors import InvalidJobError
from worker.engine.slots import Slot

TENSORS_FILE, CURSOR_FILE = "slot_state.safetensors", "slot_state.json"


def save_state(slot: Slot, directory: Path) -> None:
    tensors = {"weights": slot.weights_P, "exp_avg": slot.exp_avg_P, "exp_avg_sq": slot.exp_avg_sq_P}
    save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, directory / TENSORS_FILE)
    cursor = {
        "format": "espalier-slot-1",
        "step": slot.step,
        "num_updates": slot.num_updates,
        "num_skipped_in_a_row": slot.num_skipped_in_a_row,
        "spec": slot.job.spec.model_dump(mode="json"),
        "num_examples": len(slot.job.examples),
    }
    (directory / CURSOR_FILE).write_text(json.dumps(cursor), encoding="utf-8")


def load_state(slot: Slot, directory: Path) -> None:
    """Go on from a saved state. Raises InvalidJobError when it is another job's."""
    cursor = json.loads((directory / CURSOR_FILE).read_text(encoding="utf-8"))
    tensors = load_file(directory / TENSORS_FILE)
    # The whole spec: with another batch size, for one, the same step number is another place in the data.
    is_same_spec = cursor["spec"] == slot.job.spec.model_dump(mode="json")
    is_same_data = cursor["num_examples"] == len(slot.job.examples)
    if not (is_same_spec and is_same_data and tensors["weights"].shape == slot.weights_P.shape):
        raise InvalidJobError("The saved state belongs to another job: its spec, data or base model differs.")
    slot.weights_P.copy_(tensors["weights"])
    slot.exp_avg_P.copy_(tensors["exp_avg"])
    slot.exp_avg_sq_P.copy_(tensors["exp_avg_sq"])
    slot.step, slot.num_updates = cursor["step"], cursor["num_updates"]
    slot.num_skipped_in_a_row = cursor["num_skipped_in_a_row"]
    slot.restart_batch()
