"""The device's memory: how much a step and a slot will need, predicted before any job depends on it.

Two short forwards with an adapter on every linear are measured: a probe counts what autograd keeps. The difference
between the two is the cost of a token. The number of recomputed layers is the smallest with which a full step fits
beside the slots. On a GPU the measured peak of every step corrects the prediction: memory beyond it is workspace, and
stays reserved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor

from core.domain.training import AdapterConfig, TrainingSpec
from worker.engine.banks import BYTES_PER_PARAMETER, Bank, Layout
from worker.engine.errors import JobTooLargeError, NoFreeSlotError
from worker.engine.examples import DrawnExample, EngineJob, Example
from worker.engine.fused_bases import FusedBase
from worker.engine.heads import loss_bytes
from worker.engine.packing import pack
from worker.engine.runs import SlotRows, make_runs
from worker.engine.slots import Slot

_PROBE_TOKENS = 16
# The rest is for the allocator's fragments and for other processes on the device.
USABLE_FRACTION = 0.92
# When the number of recomputed layers is chosen, once and for all, room for every slot at this rank on all linears is
# kept. Slots never get more than that. Most jobs ask for at most this rank. With max_rank instead, a worker that allows
# one large job would recompute layers for ever.
_USUAL_RANK = 16


@dataclass(frozen=True)
class StepCost:
    """Bytes of one fused step: a token's activations in all layers, a token at one border of layers, and the loss."""

    activation_bytes: float
    border_bytes: float
    loss_bytes: int
    num_layers: int

    def predict(self, num_tokens: int, *, num_recomputed: int) -> int:
        """Return the peak: what other layers keep, the inputs of the recomputed ones, and one of these layers whole."""
        layer_bytes = self.activation_bytes / self.num_layers
        kept = (self.num_layers - num_recomputed + (num_recomputed > 0)) * layer_bytes
        return math.ceil(num_tokens * (kept + num_recomputed * self.border_bytes)) + self.loss_bytes

    def choose_recomputed(self, num_tokens: int, *, usable_bytes: float) -> int:
        """Return the smallest number of recomputed layers with which a step fits; all of them where none does."""
        counts = range(self.num_layers + 1)
        fitting = (count for count in counts if self.predict(num_tokens, num_recomputed=count) <= usable_bytes)
        return next(fitting, self.num_layers)


class DeviceMemory:
    """The device's memory as the engine sees it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_measured = device.type == "cuda"
        self._before_step = 0
        self._workspace_bytes = 0

    @property
    def usable_bytes(self) -> float:
        """What could be allocated now, less a margin and the memory that steps took beyond their prediction."""
        return USABLE_FRACTION * self._free_bytes() - self._workspace_bytes

    def begin_step(self) -> None:
        if self._is_measured:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before_step = torch.cuda.memory_allocated(self._device)

    def end_step(self, predicted_bytes: int) -> None:
        """Reserve what a successful step took beyond its prediction. A failed step shows no peak of its own."""
        if self._is_measured:
            taken = torch.cuda.max_memory_allocated(self._device) - self._before_step
            self._workspace_bytes = max(self._workspace_bytes, taken - predicted_bytes)

    def _free_bytes(self) -> int:
        if self._device.type != "cuda":
            return int(psutil.virtual_memory().available)
        free, _total = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)


class MemoryBudget:
    """Divides the device between slots and steps: a full step always fits beside the admitted slots."""

    def __init__(self, base: FusedBase, *, max_slots: int, max_rank: int, max_tokens: int) -> None:
        self._device = DeviceMemory(base.device)
        self._cost = measure_cost(base)
        left_bytes = self._device.usable_bytes - max_slots * _usual_slot_bytes(base, max_rank)
        self.num_recomputed = self._cost.choose_recomputed(max_tokens, usable_bytes=left_bytes)

    def predict(self, num_tokens: int) -> int:
        """Return the bytes that a step of this many tokens takes at its peak."""
        return self._cost.predict(num_tokens, num_recomputed=self.num_recomputed)

    @contextmanager
    def measuring(self, num_tokens: int) -> Iterator[None]:
        """Compare a step of this many tokens with its prediction, unless it raises."""
        self._device.begin_step()
        yield
        self._device.end_step(self.predict(num_tokens))

    def check_slot(self, layout: Layout, *, step_tokens: int, is_first: bool) -> None:
        """Refuse a slot that would leave a step of this many tokens too little.

        Raises JobTooLargeError for the first slot of an empty engine, because no other slot could leave, and
        NoFreeSlotError for any other.
        """
        needed = layout.num_parameters * BYTES_PER_PARAMETER + self.predict(step_tokens)
        usable = self._device.usable_bytes
        if needed <= usable:
            return
        if not is_first:
            raise NoFreeSlotError("The device has no memory for another slot of this rank.")
        raise JobTooLargeError(
            f"The job needs about {needed / 2**20:.0f} MiB beside the base, and {usable / 2**20:.0f} MiB are free; "
            "lower the rank."
        )


def measure_cost(base: FusedBase) -> StepCost:
    """Count what autograd keeps of a forward with an adapter on every linear."""
    layout = Layout.of(base.shape, rank=1, target_modules=base.shape.target_modules)
    slot = Slot(_probe_job(base.shape.target_modules), Bank(layout, 0, base.device))

    def run_decoder(num_tokens: int) -> Tensor:
        batch = pack([[DrawnExample(_probe_example(num_tokens), 0)]], base.device)
        with base.context.running(make_runs([SlotRows(slot, batch.groups[0])], is_grouped=False)):
            return base.decode(batch)

    # What does not grow with the tokens is in both counts, and cancels in the difference.
    few, many = (_kept_bytes(run_decoder, count) for count in (_PROBE_TOKENS, 2 * _PROBE_TOKENS))
    return StepCost(
        activation_bytes=(many - few) / _PROBE_TOKENS,
        border_bytes=base.shape.hidden_size * base.head.rows_VE.element_size(),
        loss_bytes=loss_bytes(base.shape.vocab_size, base.device),
        num_layers=base.shape.num_layers,
    )


def _probe_job(target_modules: tuple[str, ...]) -> EngineJob:
    """Return a job whose adapter is on every linear and as small as possible."""
    spec = TrainingSpec(
        adapter=AdapterConfig(rank=1, alpha=1.0, target_modules=target_modules),
        n_epochs=1,
        batch_size=1,
        learning_rate=1.0,
        max_seq_len=2 * _PROBE_TOKENS,
        seed=0,
    )
    return EngineJob("probe", spec, (_probe_example(_PROBE_TOKENS),), tenant="")


def _probe_example(num_tokens: int) -> Example:
    return Example(np.zeros(num_tokens, dtype=np.int64), np.arange(num_tokens) > 0)


def _kept_bytes(run_decoder: Callable[[int], Tensor], num_tokens: int) -> int:
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        # An output kept as it is would hold the function that holds it. The garbage collector does not see this cycle.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = run_decoder(num_tokens)  # keeps the tensors alive, so that no address is reused
    del hidden
    return sum(storages.values())


def _usual_slot_bytes(base: FusedBase, max_rank: int) -> int:
    layout = Layout.of(base.shape, rank=min(_USUAL_RANK, max_rank), target_modules=base.shape.target_modules)
    return layout.num_parameters * BYTES_PER_PARAMETER
