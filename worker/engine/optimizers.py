"""AdamW (Loshchilov and Hutter 2019) on one slot's flat vectors, after clipping by the slot's own norm."""

from __future__ import annotations

import math

import torch

from core.domain.training import learning_rate_at
from worker.engine.slots import Slot

_NORM_EPSILON = 1e-6


def update_weights(slot: Slot, *, grad_norm: float) -> float:
    """Apply one optimizer step with the slot's gradients and return its learning rate. Agrees with torch's AdamW."""
    spec = slot.job.spec
    grads_P = slot.grads_P
    assert grads_P is not None
    learning_rate = learning_rate_at(spec, slot.step + 1, slot.total_steps)
    slot.num_updates += 1
    grads_P.mul_(min(1.0, spec.max_grad_norm / (grad_norm + _NORM_EPSILON)))
    slot.weights_P.mul_(1 - learning_rate * spec.weight_decay)
    slot.exp_avg_P.lerp_(grads_P, 1 - spec.beta1)
    slot.exp_avg_sq_P.mul_(spec.beta2).addcmul_(grads_P, grads_P, value=1 - spec.beta2)
    bias_correction1 = 1 - spec.beta1**slot.num_updates
    bias_correction2 = 1 - spec.beta2**slot.num_updates
    denominator_P = torch.sqrt(slot.exp_avg_sq_P).div_(math.sqrt(bias_correction2)).add_(spec.epsilon)
    slot.weights_P.addcdiv_(slot.exp_avg_P, denominator_P, value=-learning_rate / bias_correction1)
    return learning_rate
