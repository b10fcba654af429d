"""The frozen language-model head: from hidden rows to the log-probability of each row's label, in chunks.

The head is frozen, so only the hidden rows have a gradient. It is known as soon as a chunk's logits are. So it is
computed in the forward, and no [M, V] tensor outlives its chunk. The objective decides how much a row counts in the
loss: this reaches the backward as one number a row.

Shapes: M label rows, C rows of a chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.frozen import freeze_linear

# Bytes of a chunk's logits in fp32. On a CPU this is below the size that its allocator returns to the system after
# every use. On a GPU it is large enough to keep the device busy.
_CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}
_MIN_CHUNK_ROWS = 32


@dataclass(frozen=True, eq=False)
class LabelScores:
    """Each label's negative log-probability, which can be differentiated, and whether it was the best guess."""

    nll_M: Tensor
    is_right_M: Tensor


class Head:
    """The frozen language-model head [V, E]: to be multiplied with, and row by row."""

    def __init__(self, linear: nn.Linear) -> None:
        self.weight = freeze_linear(linear, scratch={})
        self.rows_VE = linear.weight.detach()

    def score_labels(self, hidden_ME: Tensor, labels_M: Tensor, *, pause: Callable[[], None]) -> LabelScores:
        """Score each row's label. `pause` precedes every chunk."""
        return LabelScores(*_LabelScores.apply(hidden_ME, labels_M, self, pause))


def loss_bytes(vocab_size: int, device: torch.device) -> int:
    """Return the most that a chunk takes: its logits twice, in the head's type and in fp32."""
    return 2 * 4 * vocab_size * _chunk_rows(vocab_size, device)


class _LabelScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ME: Tensor, labels_M: Tensor, head: Head, pause: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        # In fp32 until the backward has weighed it, so that on a bf16 base it is rounded once, not twice.
        gradient_ME = torch.empty_like(hidden_ME, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        nll_M = torch.empty(len(labels_M), dtype=torch.float32, device=hidden_ME.device)
        is_right_M = torch.empty(len(labels_M), dtype=torch.bool, device=hidden_ME.device)
        for rows in _chunks(len(labels_M), _chunk_rows(len(head.rows_VE), hidden_ME.device)):
            pause()
            logits_CV = head.weight.multiply(hidden_ME[rows]).float()
            label_logits_C1 = logits_CV.gather(1, labels_M[rows, None])
            # The largest logit is subtracted before exp, which would overflow. It cancels in every quotient below.
            largest_C1 = logits_CV.amax(dim=1, keepdim=True)
            # In place, and the division by the row's sum is applied to the narrow result: a log-softmax takes three
            # times as long.
            odds_CV = logits_CV.sub_(largest_C1).exp_()
            sum_C1 = odds_CV.sum(dim=1, keepdim=True)
            nll_M[rows] = (sum_C1.log() + largest_C1 - label_logits_C1).squeeze(1)
            is_right_M[rows] = (label_logits_C1 == largest_C1).squeeze(1)
            if gradient_ME is not None:
                # (softmax - one-hot) times the head: the head's mean row under the softmax, less the label's row.
                mean_CE = head.weight.multiply_back(odds_CV.to(hidden_ME.dtype)) / sum_C1
                gradient_ME[rows] = mean_CE - head.rows_VE[labels_M[rows]]
        ctx.save_for_backward(gradient_ME)
        ctx.hidden_dtype = hidden_ME.dtype
        ctx.mark_non_differentiable(is_right_M)
        return nll_M, is_right_M

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ME,) = ctx.saved_tensors
        # In place: no other code reads it, and a second backward raises.
        return gradient_ME.mul_(gradients[0][:, None]).to(ctx.hidden_dtype), None, None, None


def _chunk_rows(vocab_size: int, device: torch.device) -> int:
    fitting = _CHUNK_BYTES[device.type] // (4 * vocab_size)
    return max(_MIN_CHUNK_ROWS, fitting // _MIN_CHUNK_ROWS * _MIN_CHUNK_ROWS)


def _chunks(num_rows: int, rows_a_chunk: int) -> list[slice]:
    return [slice(start, start + rows_a_chunk) for start in range(0, num_rows, rows_a_chunk)]
