"""AdamW (Loshchilov and Hutter 2019) on one slot's row, after clipping by the slot's own norm.

torch's own fused kernel does the update: a slot is one long vector, so that it takes a single pass over it.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw

from core.domain.training import learning_rate_at
from worker.engine.slots import Slot

_NORM_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s own


class AdamW:
    """The optimizer of all slots. An update takes no memory, so that none can fail between two slots of a step."""

    def __init__(self, device: torch.device) -> None:
        # The kernel reads these off the device. Filling them is a launch; making them would be a copy to wait for.
        self._num_updates = torch.zeros((), device=device)
        self._divisor = torch.ones((), device=device)

    def update(self, slot: Slot, *, grad_norm: float) -> float:
        """Apply one optimizer step with the slot's gradients and return its learning rate."""
        spec = slot.job.spec
        learning_rate = learning_rate_at(spec, slot.step + 1, slot.total_steps)
        adamw(
            [slot.weights_P],
            [slot.grads_P],
            [slot.exp_avg_P],
            [slot.exp_avg_sq_P],
            [],
            [self._num_updates.fill_(slot.num_updates)],
            fused=True,
            grad_scale=self._divisor.fill_(max(1.0, (grad_norm + _NORM_EPSILON) / spec.max_grad_norm)),
            amsgrad=False,
            beta1=spec.beta1,
            beta2=spec.beta2,
            lr=learning_rate,
            weight_decay=spec.weight_decay,
            eps=spec.epsilon,
            maximize=False,
        )
        slot.num_updates += 1
        return learning_rate
