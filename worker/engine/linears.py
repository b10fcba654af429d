"""A frozen linear that adds each slot's LoRA to that slot's own rows of the packed stream.

The base product (dense, or NF4 with its dequantisation) is computed once for all tenants. The LoRA part is one
autograd function that loops over the slots of the step; its backward writes each slot's gradients into step-local
buffers, so that nothing of a step counts until its backward has succeeded. Shapes: T rows of the stream, t rows of one
slot, K in, N out, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.packing import Group
from worker.engine.slots import LoraPair, Slot, stable_hash


@dataclass(frozen=True, eq=False)
class SlotRows:
    """One slot's part of a step: its rows, its weights, and where its gradients go (None when evaluating)."""

    slot: Slot
    group: Group
    grads: dict[str, LoraPair] | None


class StepContext:
    """What the linears need to know of the step under way. One object, shared by all of an engine's linears."""

    def __init__(self, device: torch.device) -> None:
        # Makes the LoRA function differentiable even where its input is not, as in the first layer.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.parts: tuple[SlotRows, ...] = ()


class FusedLinear(nn.Module):
    """Wraps one linear of the base."""

    def __init__(self, base: nn.Module, name: str, context: StepContext) -> None:
        super().__init__()
        self.base = base
        self._name = name
        self._context = context

    def forward(self, x_1TK: Tensor) -> Tensor:
        y_1TN: Tensor = self.base(x_1TK)
        parts = [part for part in self._context.parts if self._name in part.slot.linears]
        if not parts:
            return y_1TN
        delta_TN: Tensor = _SlotsLora.apply(self._context.anchor, x_1TK[0], self._name, parts, y_1TN.shape[-1])
        return y_1TN + delta_TN


class _SlotsLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, x_TK: Tensor, name: str, parts: list[SlotRows], num_outputs: int) -> Tensor:
        delta_TN = x_TK.new_zeros(x_TK.shape[0], num_outputs)
        hidden = []
        for part in parts:
            rows, pair = slice(part.group.start, part.group.end), part.slot.weights[name]
            x_tK = _drop(x_TK[rows], part, name)
            h_tR = x_tK @ pair.A_RK.to(x_TK.dtype).T
            torch.mul(h_tR @ pair.B_NR.to(x_TK.dtype).T, part.slot.job.spec.adapter.scale, out=delta_TN[rows])
            hidden.append(h_tR)
        ctx.save_for_backward(x_TK, *hidden)
        ctx.name, ctx.parts = name, parts
        return delta_TN

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, *hidden = ctx.saved_tensors
        delta_grad_TN = gradients[0]
        x_grad_TK = torch.zeros_like(x_TK)
        for part, h_tR in zip(ctx.parts, hidden, strict=True):
            rows, pair = slice(part.group.start, part.group.end), part.slot.weights[ctx.name]
            scaled_tN = delta_grad_TN[rows] * part.slot.job.spec.adapter.scale
            h_grad_tR = scaled_tN @ pair.B_NR.to(x_TK.dtype)
            assert part.grads is not None
            grads = part.grads[ctx.name]
            grads.B_NR.copy_(scaled_tN.T @ h_tR)
            grads.A_RK.copy_(h_grad_tR.T @ _drop(x_TK[rows], part, ctx.name))
            x_grad_TK[rows] = _drop(h_grad_tR @ pair.A_RK.to(x_TK.dtype), part, ctx.name)
        return None, x_grad_TK, None, None, None


def _drop(rows_tK: Tensor, part: SlotRows, name: str) -> Tensor:
    """Apply a slot's LoRA dropout: the same mask for the same example, epoch and linear, wherever it is computed."""
    probability = part.slot.job.spec.adapter.dropout
    if probability == 0 or part.grads is None:
        return rows_tK
    masks = []
    for sequence in part.group.sequences:
        generator = torch.Generator(rows_tK.device).manual_seed(stable_hash(sequence.dropout_key, name))
        shape = (sequence.end - sequence.start, rows_tK.shape[1])
        masks.append(torch.rand(shape, generator=generator, device=rows_tK.device) >= probability)
    return torch.where(torch.cat(masks), rows_tK / (1 - probability), 0)
