"""AdamW (Loshchilov and Hutter 2019) on one adapter's row, after clipping by the row's own norm.

torch's own fused kernel does the update: a row is one long vector, so that it takes a single pass over it.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw

from core.domain.training import TrainingSpec
from worker.engine.rows import AdapterRow

_NORM_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s own


class AdamW:
    """The optimizer of all rows. An update allocates no memory, so a step's updates cannot fail half-way."""

    def __init__(self, device: torch.device) -> None:
        # The kernel reads these on the device. Filling them is one launch; new tensors would be copies that the step
        # waits for.
        self._num_updates = torch.zeros((), device=device)
        self._divisor = torch.ones((), device=device)

    def update(self, row: AdapterRow, spec: TrainingSpec, *, learning_rate: float, grad_norm: float) -> None:
        """Apply one optimizer step with the row's gradients, whose norm is given.

        The kernel divides gradients by `grad_scale`. Dividing by max(1, norm / max_grad_norm) is clipping.
        """
        adamw(
            [row.weights_P],
            [row.grads_P],
            [row.exp_avg_P],
            [row.exp_avg_sq_P],
            [],
            [self._num_updates.fill_(row.num_updates)],
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
        row.num_updates += 1
