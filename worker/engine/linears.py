"""A frozen linear that adds each slot's LoRA to that slot's own rows of the packed stream.

The base's product is taken once for all tenants. LoRA is added in place, and nothing of it is kept for the backward but
the narrow rows between A and B. Shapes: T rows of the stream, t rows of one run, K in, N out, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.banks import LoraStack
from worker.engine.frozen import FrozenWeight
from worker.engine.runs import Run


class StepContext:
    """What the linears need to know of the step under way. One object, shared by all of an engine's linears."""

    def __init__(self, device: torch.device) -> None:
        # Makes the products differentiable even where their input is not, as in the first layer.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.runs: tuple[Run, ...] = ()

    @contextmanager
    def running(self, runs: tuple[Run, ...]) -> Iterator[None]:
        """Be in a step of these runs."""
        self.runs = runs
        try:
            yield
        finally:
            self.runs = ()


class FusedLinear(nn.Module):
    """Stands in the base where one of its linears was."""

    def __init__(self, weight: FrozenWeight, name: str, context: StepContext) -> None:
        super().__init__()
        self.weight = weight
        self.name = name
        self._context = context

    def forward(self, x_1TK: Tensor) -> Tensor:
        runs = [run for run in self._context.runs if self.name in run.bank.layout.linears]
        y_1TN: Tensor = _AdaptedProduct.apply(self._context.anchor, x_1TK, self, runs)
        return y_1TN


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, x_1TK: Tensor, linear: FusedLinear, runs: list[Run]) -> Tensor:
        y_1TN = linear.weight.multiply(x_1TK)
        hidden = []
        for run in runs:
            lora = run.weights(linear.name, x_1TK.dtype)
            h_tR = run.multiply(run.drop(x_1TK[0, run.rows], linear.name), lora.A_SRK.transpose(1, 2))
            run.add_product(y_1TN[0, run.rows], h_tR, lora.Bt_SRN)
            hidden.append(h_tR)
        ctx.save_for_backward(x_1TK if runs else None, *hidden)
        ctx.linear, ctx.runs = linear, runs
        return y_1TN

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_1TK, *hidden = ctx.saved_tensors
        y_grad_1TN, name = gradients[0].contiguous(), ctx.linear.name
        x_grad_1TK = ctx.linear.weight.multiply_back(y_grad_1TN) if ctx.needs_input_grad[1] else None
        for run, h_tR in zip(ctx.runs, hidden, strict=True):
            lora, y_grad_tN = run.weights(name, x_1TK.dtype), y_grad_1TN[0, run.rows]
            # Both gradients are collected times the scale, which is left out here and in h.
            h_grad_tR = run.multiply(y_grad_tN, lora.Bt_SRN.transpose(1, 2))
            A_grad_SRK = run.sum_outer(h_grad_tR, run.drop(x_1TK[0, run.rows], name))
            run.collect_grads(name, LoraStack(A_grad_SRK, run.sum_outer(h_tR, y_grad_tN)))
            if x_grad_1TK is not None:
                _add_input_grads(run, x_grad_1TK[0, run.rows], h_grad_tR, lora.A_SRK, name)
        return None, x_grad_1TK, None, None


def _add_input_grads(run: Run, x_grad_tK: Tensor, h_grad_tR: Tensor, A_SRK: Tensor, name: str) -> None:
    if run.kind.has_dropout:
        x_grad_tK.add_(run.drop(run.multiply(h_grad_tR, A_SRK), name), alpha=run.kind.scale)
    else:
        run.add_product(x_grad_tK, h_grad_tR, A_SRK)
