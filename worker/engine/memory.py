"""What the engine will need of the device's memory, known before any job depends on it.

A probe counts what autograd keeps of two short forwards with an adapter on every linear; their difference is what a
token costs. The number of recomputed layers is the smallest with which a full step fits beside the slots. On a GPU
every step's measured peak corrects the prediction: what it took beyond it is workspace, and stays reserved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor

from core.domain.training import AdapterConfig, TrainingSpec
from worker.engine.examples import EngineJob, Example

_PROBE_TOKENS = 16
# The rest is for the allocator's fragments and for everybody else on the device.
USABLE_FRACTION = 0.92


@dataclass(frozen=True)
class StepCost:
    """Bytes of one fused step: a token's activations in all layers, a token at one border of layers, and the loss."""

    activation_bytes: float
    border_bytes: float
    loss_bytes: int
    num_layers: int

    def predict(self, num_tokens: int, *, num_recomputed: int) -> int:
        """Return the peak: what the other layers keep, the recomputed ones' inputs, and one of those layers whole."""
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
        self.workspace_bytes = 0

    @property
    def usable_bytes(self) -> float:
        """What could be allocated now, less a margin and what steps were seen to take beyond their prediction."""
        return USABLE_FRACTION * self._free_bytes() - self.workspace_bytes

    def begin_step(self) -> None:
        if self._is_measured:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before_step = torch.cuda.memory_allocated(self._device)

    def end_step(self, predicted_bytes: int) -> None:
        if self._is_measured:
            taken = torch.cuda.max_memory_allocated(self._device) - self._before_step
            self.workspace_bytes = max(self.workspace_bytes, taken - predicted_bytes)

    def _free_bytes(self) -> int:
        if self._device.type != "cuda":
            return int(psutil.virtual_memory().available)
        free, _total = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)


def measure_activations(run_decoder: Callable[[int], Tensor]) -> float:
    """Return the bytes that a token adds to what autograd keeps of `run_decoder(n)`, a forward over n tokens."""
    small, large = (_kept_bytes(run_decoder, count) for count in (_PROBE_TOKENS, 2 * _PROBE_TOKENS))
    return (large - small) / _PROBE_TOKENS


def probe_job(target_modules: tuple[str, ...]) -> EngineJob:
    """Return a job whose adapter is on every linear and as small as can be."""
    spec = TrainingSpec(
        adapter=AdapterConfig(rank=1, alpha=1.0, target_modules=target_modules),
        n_epochs=1,
        batch_size=1,
        learning_rate=1.0,
        max_seq_len=2 * _PROBE_TOKENS,
        seed=0,
    )
    return EngineJob("probe", spec, (probe_example(_PROBE_TOKENS),), tenant="")


def probe_example(num_tokens: int) -> Example:
    return Example(np.zeros(num_tokens, dtype=np.int64), np.arange(num_tokens) > 0)


def _kept_bytes(run_decoder: Callable[[int], Tensor], num_tokens: int) -> int:
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        # An output kept as it is would hold the function that holds it: a cycle which nobody collects.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = run_decoder(num_tokens)  # it holds what it keeps, so that no address is met twice
    del hidden
    return sum(storages.values())
