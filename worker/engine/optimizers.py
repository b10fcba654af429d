"""AdamW (Loshchilov and Hutter 2019) on one slot's row, after clipping by the slot's own norm.

torch's own fused kernel does the update: a slot is one long vector, so that it takes a single pass over it.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw

from core.domain.training import learning_rate_at
from worker.engine.slots import Slot

_NORM_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s own


def update_weights(slot: Slot, *, grad_norm: float) -> float:
    """Apply one optimizer step with the slot's gradients and return its learning rate."""
    spec = slot.job.spec
    learning_rate = learning_rate_at(spec, slot.step + 1, slot.total_steps)
    divisor = max(1.0, (grad_norm + _NORM_EPSILON) / spec.max_grad_norm)
    adamw(
        [slot.weights_P],
        [slot.grads_P],
        [slot.exp_avg_P],
        [slot.exp_avg_sq_P],
        [],
        [torch.tensor(float(slot.num_updates), device=slot.weights_P.device)],
        fused=True,
        grad_scale=torch.tensor(divisor, device=slot.weights_P.device),  # the kernel divides by it
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
