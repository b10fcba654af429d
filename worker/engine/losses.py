"""Cross-entropy over the label rows only, in chunks, with the gradient taken in the same pass.

The head is frozen, so the only gradient is that of the hidden rows, and it is known as soon as a chunk's logits are:
no [M, V] tensor outlives its chunk. Shapes: M label rows, C rows of a chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ROWS = 512


@dataclass(frozen=True, eq=False)
class RowLosses:
    """The weighted sum to differentiate; of each row, the plain loss and whether the best guess was right."""

    weighted_sum: Tensor
    losses_M: Tensor
    is_right_M: Tensor


def cross_entropy(hidden_ME: Tensor, labels_M: Tensor, weights_M: Tensor, head: nn.Linear) -> RowLosses:
    """Return each row's cross-entropy against its label; the sum is weighted row by row."""
    return RowLosses(*_CrossEntropy.apply(hidden_ME, labels_M, weights_M, head.weight, head.bias))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ME: Tensor, labels_M: Tensor, weights_M: Tensor, weight_VE: Tensor, bias_V: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient_ME = torch.empty_like(hidden_ME)
        losses_M = torch.empty(len(labels_M), dtype=torch.float32, device=hidden_ME.device)
        is_right_M = torch.empty(len(labels_M), dtype=torch.bool, device=hidden_ME.device)
        for start in range(0, len(labels_M), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits_CV = nn.functional.linear(hidden_ME[rows], weight_VE, bias_V).float()
            labels_C1 = labels_M[rows, None]
            log_total_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
            losses_M[rows] = (log_total_C1 - logits_CV.gather(1, labels_C1)).squeeze(1)
            is_right_M[rows] = logits_CV.argmax(dim=1) == labels_M[rows]
            gradient_CV = logits_CV.sub_(log_total_C1).exp_()
            gradient_CV.scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1, dtype=torch.float32))
            gradient_CV.mul_(weights_M[rows, None])
            gradient_ME[rows] = gradient_CV.to(weight_VE.dtype) @ weight_VE
        ctx.save_for_backward(gradient_ME)
        ctx.mark_non_differentiable(losses_M, is_right_M)
        return (losses_M * weights_M).sum(), losses_M, is_right_M

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ME,) = ctx.saved_tensors
        return gradient_ME * gradients[0].to(gradient_ME.dtype), None, None, None, None
