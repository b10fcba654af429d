"""Banks: the slots of one layout side by side, so that one batched product serves all of their jobs.

A layout is a rank and a set of target linears; everything of one slot is one row. Ranks are rounded up to a multiple of
8, which is what the device's batched products want of a matrix and what lets neighbouring ranks share a bank; what is
padded is zero, gets a gradient of exactly zero and stays zero. Occupied rows are always the first ones: when a slot
leaves, the last row moves into its place. A parameter costs 16 bytes: weight, gradient and two moments in fp32.

Shapes: S slots of a bank, P numbers of a slot, R padded rank, K and N inputs and outputs of a linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.bases import BaseShape

RANK_MULTIPLE = 8
BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class Layout:
    """Where each linear's A [R, K] and transposed B [R, N] stand in a slot's row; `linears` maps a name to (K, N)."""

    padded_rank: int
    target_modules: tuple[str, ...]
    linears: dict[str, tuple[int, int]]
    starts: dict[str, int]
    num_parameters: int

    @classmethod
    def of(cls, shape: BaseShape, *, rank: int, target_modules: tuple[str, ...]) -> Layout:
        padded_rank = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
        linears = {name: size for name, size in shape.linears.items() if name.rpartition(".")[2] in target_modules}
        starts, end = {}, 0
        for name, (k, n) in linears.items():
            starts[name] = end
            end += padded_rank * (k + n)
        return cls(padded_rank, tuple(sorted(target_modules)), linears, starts, end)

    def columns(self, name: str) -> tuple[slice, slice]:
        """Return where a linear's A and its transposed B stand in a row."""
        (k, n), start = self.linears[name], self.starts[name]
        middle = start + self.padded_rank * k
        return slice(start, middle), slice(middle, middle + self.padded_rank * n)


@dataclass(frozen=True, eq=False)
class LoraStack:
    """A [S, R, K] and B, transposed [S, R, N], of one linear in some rows of a bank: views, or as wanted for a step."""

    A_SRK: Tensor
    Bt_SRN: Tensor


class Bank:
    """The rows of one layout, each four vectors of P numbers. `index` orders an engine's banks in the stream."""

    def __init__(self, layout: Layout, index: int, device: torch.device) -> None:
        self.layout = layout
        self.index = index
        self.num_rows = 0
        # Making a view takes longer than a small product, and every step asks for the same ones.
        self._known_views: dict[tuple[int, int, int, str], LoraStack] = {}
        self.weights_SP, self.grads_SP, self.exp_avg_SP, self.exp_avg_sq_SP = (
            torch.zeros(0, layout.num_parameters, device=device) for _ in range(4)
        )

    def add_row(self) -> int:
        """Return the index of a new row of zeros. Raises torch.OutOfMemoryError, and then no row was added."""
        self._resize(self.num_rows + 1)
        self.num_rows += 1
        return self.num_rows - 1

    def remove_row(self, row: int) -> None:
        """Take a row out and move the last one into its place. No trace of it stays in the memory."""
        last = self.num_rows - 1
        for vectors_SP in (self.weights_SP, self.grads_SP, self.exp_avg_SP, self.exp_avg_sq_SP):
            vectors_SP[row] = vectors_SP[last]
            vectors_SP[last] = 0
        self.num_rows = last
        self._resize(last)

    def weights(self, rows: slice | Tensor, name: str) -> LoraStack:
        """Return one linear's matrices in some rows: views for a slice, copies for indices."""
        if isinstance(rows, slice):
            return self._views(self.weights_SP, rows, name)
        a_columns, b_columns = self.layout.columns(name)
        shape = (len(rows), self.layout.padded_rank, -1)
        return LoraStack(self.weights_SP[rows, a_columns].view(shape), self.weights_SP[rows, b_columns].view(shape))

    def collect_grads(
        self, rows: slice | Tensor, name: str, found: LoraStack, *, factor: float, is_first: bool
    ) -> None:
        """Start one linear's gradients of an optimizer batch with `factor` times these, or add that to them."""
        if isinstance(rows, slice):
            kept = self._views(self.grads_SP, rows, name)
            for kept_SRK, found_SRK in ((kept.A_SRK, found.A_SRK), (kept.Bt_SRN, found.Bt_SRN)):
                if is_first:
                    torch.mul(found_SRK, factor, out=kept_SRK)
                else:
                    kept_SRK.add_(found_SRK, alpha=factor)
            return
        for columns, found_SRK in zip(self.layout.columns(name), (found.A_SRK, found.Bt_SRN), strict=True):
            scaled = found_SRK.flatten(1).to(torch.float32) * factor
            self.grads_SP[rows, columns] = scaled if is_first else self.grads_SP[rows, columns] + scaled

    def _views(self, vectors_SP: Tensor, rows: slice, name: str) -> LoraStack:
        key = (vectors_SP.data_ptr(), rows.start, rows.stop, name)
        if key not in self._known_views:
            a_columns, b_columns = self.layout.columns(name)
            shape = (rows.stop - rows.start, self.layout.padded_rank, -1)
            a_SP, b_SP = vectors_SP[rows, a_columns], vectors_SP[rows, b_columns]
            self._known_views[key] = LoraStack(a_SP.view(shape), b_SP.view(shape))
        return self._known_views[key]

    def _resize(self, num_rows: int) -> None:
        self._known_views.clear()
        # One after the other, so that at most one vector a row is held twice.
        self.weights_SP = _resized(self.weights_SP, num_rows)
        self.grads_SP = _resized(self.grads_SP, num_rows)
        self.exp_avg_SP = _resized(self.exp_avg_SP, num_rows)
        self.exp_avg_sq_SP = _resized(self.exp_avg_sq_SP, num_rows)


def _resized(vectors_SP: Tensor, num_rows: int) -> Tensor:
    """Return the first rows in a tensor of their own, and leave nothing of them where they were."""
    if len(vectors_SP) == num_rows:
        return vectors_SP
    resized_SP = vectors_SP.new_zeros(num_rows, vectors_SP.shape[1])
    num_kept = min(num_rows, len(vectors_SP))
    resized_SP[:num_kept] = vectors_SP[:num_kept]
    vectors_SP.zero_()
    return resized_SP
