"""An adapter's row of its bank: its weights, its gradients and its optimizer's state.

A row does not depend on the source of its examples, which is the cursor's part of a slot.

Shapes: P numbers of the row, R the adapter's own rank, K and N inputs and outputs of a linear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from core.domain.training import AdapterConfig
from worker.engine.banks import Bank
from worker.engine.seeds import stable_hash


@dataclass(frozen=True, eq=False)
class LoraPair:
    """Views of one adapter's A [R, K] and B [N, R] of one linear, at the adapter's own rank."""

    A_RK: Tensor
    B_NR: Tensor


class AdapterRow:
    """One adapter's row. Raises torch.OutOfMemoryError when the device has no memory for it.

    `num_updates` counts the updates that the moments have seen, by which AdamW corrects their bias.
    """

    def __init__(self, bank: Bank, adapter: AdapterConfig, *, seed: int) -> None:
        self.bank = bank
        self.adapter = adapter
        self.num_updates = 0
        drawn_P = self._draw_weights(seed)
        # The row is added last, and the copy into it takes no memory. So a failure leaves no row behind.
        self._place = bank.add_row()
        self.weights_P.copy_(drawn_P)

    @property
    def index(self) -> int:
        return self._place.index

    @property
    def weights_P(self) -> Tensor:
        return self.bank.weights_SP[self.index]

    @property
    def grads_P(self) -> Tensor:
        """The gradients of the current optimizer batch; meaningless before its first fused step."""
        return self.bank.grads_SP[self.index]

    @property
    def exp_avg_P(self) -> Tensor:
        return self.bank.exp_avg_SP[self.index]

    @property
    def exp_avg_sq_P(self) -> Tensor:
        return self.bank.exp_avg_sq_SP[self.index]

    def pairs(self) -> dict[str, LoraPair]:
        """Return the weights as matrices, by the linear's qualified name."""
        return self.view(self.weights_P)

    def view(self, numbers_P: Tensor) -> dict[str, LoraPair]:
        """Return a row's P numbers, wherever they are, as matrices, by the linear's qualified name."""
        layout, rank, pairs = self.bank.layout, self.adapter.rank, {}
        for name, columns in layout.columns.items():
            A_RK, Bt_RN = (numbers_P[side].view(layout.padded_rank, -1) for side in columns)
            pairs[name] = LoraPair(A_RK[:rank], Bt_RN[:rank].T)
        return pairs

    def forget_moments(self) -> None:
        """Reset the optimizer's state, as for weights that it has never updated."""
        self.exp_avg_P.zero_()
        self.exp_avg_sq_P.zero_()
        self.num_updates = 0

    def remove(self) -> None:
        """Remove the row from its bank, with all traces. Never fails."""
        self.bank.remove_row(self._place)

    def _draw_weights(self, seed: int) -> Tensor:
        """Draw A as PEFT does (uniform, bound 1/sqrt(K)), with a seed for each matrix. B is zero."""
        drawn_P = torch.zeros(self.bank.layout.num_parameters)
        for name, pair in self.view(drawn_P).items():
            generator = torch.Generator().manual_seed(stable_hash(seed, name))
            bound = 1 / math.sqrt(pair.A_RK.shape[1])
            drawn_RK = torch.rand(pair.A_RK.shape, generator=generator).mul_(2 * bound).sub_(bound)
            pair.A_RK.copy_(drawn_RK)
        return drawn_P
