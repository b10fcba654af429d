"""Frozen linears that add each slot's LoRA to that slot's own rows of the packed stream.

The base's product is taken once for all tenants. LoRA is added to it in place, and the backward keeps nothing of LoRA
but the narrow rows h between A and B. Siblings, the linears that read the same rows, are one autograd function: their
As are one matrix, and the gradients of the rows that they share are added up without autograd.

For one row x of a slot with scale s, the forward is h = A x and y = W x + s B h. With ' for transposed, the backward is
dh = B' dy, dA = s dh x', dB = s dy h', and s A' dh is added to the gradient of x. The scale is applied where a result
is added, by `collect_grads` to dA and dB and by `add_product` to the rest.

Shapes: T rows of the stream, t rows of one run, S slots of the run, K in, N out, R rank, J the ranks of siblings side
by side. Bt is B transposed, as banks store it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.banks import LoraStack
from worker.engine.errors import UnsupportedBaseError
from worker.engine.frozen import FrozenWeight
from worker.engine.runs import Run
from worker.engine.steps import StepContext


class Siblings:
    """Linears that read the same rows. A call of the first multiplies for all; the others take their own outputs."""

    def __init__(self, names: tuple[str, ...], weights: Sequence[FrozenWeight], context: StepContext) -> None:
        self.names = names
        self.pause = context.pause
        self._weights = weights
        self._context = context

    def take(self, name: str, x_1TK: Tensor) -> Tensor:
        """Return one linear's outputs [1, T, N].

        Raises UnsupportedBaseError when the siblings are not called in their order on the very same rows.
        """
        waiting = self._context.waiting
        if name == self.names[0]:
            self.pause()
            outputs = _AdaptedProducts.apply(self._context.anchor, x_1TK, self, self._context.runs)
            waiting.update((each, (x_1TK, y_1TN)) for each, y_1TN in zip(self.names, outputs, strict=True))
        if name not in waiting or waiting[name][0] is not x_1TK:
            raise UnsupportedBaseError(f"{' and '.join(self.names)} do not read the same rows, in this order.")
        return waiting.pop(name)[1]

    def multiply(self, x_1TK: Tensor) -> dict[str, Tensor]:
        return {name: weight.multiply(x_1TK) for name, weight in zip(self.names, self._weights, strict=True)}

    def multiply_back(self, y_grads: dict[str, Tensor]) -> Tensor:
        """Return the gradient of the rows that all of them read [1, T, K]."""
        first, *others = (
            weight.multiply_back(y_grads[name]) for name, weight in zip(self.names, self._weights, strict=True)
        )
        for other in others:
            first.add_(other)
        return first


class FusedLinear(nn.Module):
    """Replaces one linear of the base."""

    def __init__(self, name: str, siblings: Siblings) -> None:
        super().__init__()
        self._name = name
        self._siblings = siblings

    def forward(self, x_1TK: Tensor) -> Tensor:
        return self._siblings.take(self._name, x_1TK)


class _AdaptedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _anchor: Tensor, x_1TK: Tensor, siblings: Siblings, runs: tuple[Run, ...]
    ) -> tuple[Tensor, ...]:
        ys = siblings.multiply(x_1TK)
        # With dropout each sibling drops other inputs, so it is a part of its own. Otherwise the siblings of a run are
        # one part.
        parts = [(run, names) for run in runs for names in run.adapted(siblings.names)]
        hidden = []
        for run, names in parts:
            lora = run.weights(names, x_1TK.dtype)
            h_tJ = run.multiply(run.drop(x_1TK[0, run.rows], names[0]), lora.A_SJK.transpose(1, 2))
            for name, h_tR, Bt_SRN in zip(names, h_tJ.chunk(len(names), dim=1), lora.Bts_SRN, strict=True):
                run.add_product(ys[name][0, run.rows], h_tR, Bt_SRN)
            hidden.append(h_tJ)
        ctx.save_for_backward(x_1TK if parts else None, *hidden)
        ctx.siblings, ctx.parts = siblings, parts
        return tuple(ys.values())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_1TK, *hidden = ctx.saved_tensors
        siblings: Siblings = ctx.siblings
        siblings.pause()
        y_grads = {name: grad_1TN.contiguous() for name, grad_1TN in zip(siblings.names, gradients, strict=True)}
        # The first layer's inputs are embeddings of a frozen base, and their gradient is not needed.
        x_grad_1TK = siblings.multiply_back(y_grads) if ctx.needs_input_grad[1] else None
        for (run, names), h_tJ in zip(ctx.parts, hidden, strict=True):
            lora, y_grads_tN = run.weights(names, x_1TK.dtype), [y_grads[name][0, run.rows] for name in names]
            # h and its gradient do not include the scale; `collect_grads` and `_add_input_grads` apply it.
            h_grads_tR = [
                run.multiply(y_grad_tN, Bt_SRN.transpose(1, 2))
                for y_grad_tN, Bt_SRN in zip(y_grads_tN, lora.Bts_SRN, strict=True)
            ]
            h_grad_tJ = torch.cat(h_grads_tR, dim=1) if len(names) > 1 else h_grads_tR[0]
            A_grad_SJK = run.sum_outer(h_grad_tJ, run.drop(x_1TK[0, run.rows], names[0]))
            hs_tR = h_tJ.chunk(len(names), dim=1)
            B_grads = [run.sum_outer(h_tR, y_grad_tN) for h_tR, y_grad_tN in zip(hs_tR, y_grads_tN, strict=True)]
            run.collect_grads(names, LoraStack(A_grad_SJK, tuple(B_grads)))
            if x_grad_1TK is not None:
                _add_input_grads(run, x_grad_1TK[0, run.rows], h_grad_tJ, lora.A_SJK, names[0])
        return None, x_grad_1TK, None, None


def _add_input_grads(run: Run, x_grad_tK: Tensor, h_grad_tJ: Tensor, A_SJK: Tensor, name: str) -> None:
    """Add what the LoRA branch contributes to the gradient of its inputs, through the mask that dropped them."""
    if run.kind.has_dropout:
        x_grad_tK.add_(run.drop(run.multiply(h_grad_tJ, A_SJK), name), alpha=run.kind.scale)
    else:
        run.add_product(x_grad_tK, h_grad_tJ, A_SJK)
