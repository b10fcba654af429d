"""Banks: the slots of one layout side by side, so that one batched product serves all of their jobs.

A layout is a rank and a set of target linears. Everything that one slot owns is one row. A parameter costs 16 bytes:
weight, gradient and two moments, all in fp32.

Ranks are rounded up to a multiple of 8. The device's batched products need that in bf16, where a matrix's stride must
be a multiple of 16 bytes, and it lets neighbouring ranks share a bank. The padding is zero at first. It stays zero: a
zero column of B makes the gradient of A's row zero, and the other way round.

Occupied rows are always the first ones. When a slot leaves, the last row moves into its place.

Shapes: S slots of a bank, P numbers of a slot, R padded rank, K and N inputs and outputs of a linear, J the padded
ranks of siblings (linears that read the same rows) side by side.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from worker.engine.bases import BaseShape

RANK_MULTIPLE = 8
BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class Layout:
    """Which `columns` of a slot's row are a linear's A [R, K] and its transposed B [R, N].

    A row holds one group of siblings after another: the A of each of its linears, then the B of each. So the As of
    siblings are one matrix [J, K], and one product serves them all.
    """

    padded_rank: int
    target_modules: tuple[str, ...]
    columns: dict[str, tuple[slice, slice]]
    num_parameters: int

    @classmethod
    def of(cls, shape: BaseShape, *, rank: int, target_modules: tuple[str, ...]) -> Layout:
        padded_rank = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
        columns: dict[str, tuple[slice, slice]] = {}
        end = 0
        for siblings in shape.siblings:
            names = [name for name in siblings if name.rpartition(".")[2] in target_modules]
            widths = [shape.linears[name][side] for side in (0, 1) for name in names]
            borders = list(accumulate((padded_rank * width for width in widths), initial=end))
            pieces = [slice(*border) for border in pairwise(borders)]
            columns |= zip(names, zip(pieces[: len(names)], pieces[len(names) :], strict=True), strict=True)
            end = borders[-1]
        return cls(padded_rank, tuple(sorted(target_modules)), columns, end)

    def matrix_columns(self, names: tuple[str, ...]) -> tuple[slice, ...]:
        """Return where the As of these siblings stand, all of them as one, and then where each B does."""
        found = [self.columns[name] for name in names]
        return slice(found[0][0].start, found[-1][0].stop), *(b_columns for _, b_columns in found)


@dataclass(frozen=True, eq=False)
class LoraStack:
    """The As of siblings as one [S, J, K] and each B, transposed [S, R, N], in some rows of a bank."""

    A_SJK: Tensor
    Bts_SRN: tuple[Tensor, ...]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        return self.A_SJK, *self.Bts_SRN


@dataclass(eq=False)
class Place:
    """Where a row stands in its bank. `index` changes when another row is removed."""

    index: int


class Bank:
    """The rows of one layout. Weights, gradients and both moments are a matrix [S, P] each.

    `index` orders an engine's banks in the stream. The matrices have as many rows as there are slots, or more where the
    device had no memory for a smaller copy. Rows that no slot owns are zero.
    """

    def __init__(self, layout: Layout, index: int, device: torch.device) -> None:
        self.layout = layout
        self.index = index
        self._places: list[Place] = []
        # Making a view takes longer than a small product, and every step needs the same views. The key includes the
        # memory's address, and `_resize` drops all views, so no view outlives its memory.
        self._known_views: dict[tuple[int, int, int, tuple[str, ...]], LoraStack] = {}
        self._vectors = [torch.zeros(0, layout.num_parameters, device=device) for _ in range(4)]

    @property
    def num_rows(self) -> int:
        return len(self._places)

    @property
    def weights_SP(self) -> Tensor:
        return self._vectors[0]

    @property
    def grads_SP(self) -> Tensor:
        return self._vectors[1]

    @property
    def exp_avg_SP(self) -> Tensor:
        return self._vectors[2]

    @property
    def exp_avg_sq_SP(self) -> Tensor:
        return self._vectors[3]

    def add_row(self) -> Place:
        """Return where a new row of zeros is. Raises torch.OutOfMemoryError, and then no row was added."""
        try:
            self._resize(at_least=self.num_rows + 1)
        except torch.OutOfMemoryError:
            self._release()
            raise
        self._places.append(Place(self.num_rows))
        return self._places[-1]

    def remove_row(self, place: Place) -> None:
        """Take a row out and move the last one into its place. No trace of it stays in the memory. Never fails.

        Nothing is allocated until the rows are in order again. Memory that cannot be given back after that stays taken,
        and no slot is harmed.
        """
        last = self._places.pop()
        for vectors_SP in self._vectors:
            vectors_SP[place.index].copy_(vectors_SP[last.index])
            vectors_SP[last.index].zero_()
        if last is not place:
            self._places[place.index] = last
            last.index = place.index
        self._release()

    def weights(self, rows: slice | Tensor, names: tuple[str, ...]) -> LoraStack:
        """Return the matrices of siblings in some rows: views for a slice, copies for indices."""
        if isinstance(rows, slice):
            return self._views(self.weights_SP, rows, names)
        return self._stack(self.weights_SP, rows, names)

    def collect_grads(
        self, rows: slice | Tensor, names: tuple[str, ...], found: LoraStack, *, factor: float, is_first: bool
    ) -> None:
        """Add `factor` times these to the siblings' gradients; the first ones of an optimizer batch replace them."""
        if isinstance(rows, slice):
            kept = self._views(self.grads_SP, rows, names)
            for kept_SJK, found_SJK in zip(kept.matrices, found.matrices, strict=True):
                if is_first:
                    torch.mul(found_SJK, factor, out=kept_SJK)
                else:
                    kept_SJK.add_(found_SJK, alpha=factor)
            return
        # Rows that are not neighbours have no view. Indexing copies them, so writing needs the index on the left side.
        for columns, found_SJK in zip(self.layout.matrix_columns(names), found.matrices, strict=True):
            scaled = found_SJK.flatten(1).to(torch.float32) * factor
            self.grads_SP[rows, columns] = scaled if is_first else self.grads_SP[rows, columns] + scaled

    def _views(self, vectors_SP: Tensor, rows: slice, names: tuple[str, ...]) -> LoraStack:
        key = (vectors_SP.data_ptr(), rows.start, rows.stop, names)
        if key not in self._known_views:
            self._known_views[key] = self._stack(vectors_SP, rows, names)
        return self._known_views[key]

    def _stack(self, vectors_SP: Tensor, rows: slice | Tensor, names: tuple[str, ...]) -> LoraStack:
        a_SP, *b_SP = (vectors_SP[rows, columns] for columns in self.layout.matrix_columns(names))
        num_rows, rank = len(a_SP), self.layout.padded_rank
        stacked = tuple(piece_SP.view(num_rows, rank, -1) for piece_SP in b_SP)
        return LoraStack(a_SP.view(num_rows, len(names) * rank, -1), stacked)

    def _release(self) -> None:
        """Free the memory beyond the rows. Where there is no memory for smaller copies, the larger matrices stay."""
        with suppress(torch.OutOfMemoryError):
            self._resize(at_most=self.num_rows)

    def _resize(self, *, at_least: int = 0, at_most: int = sys.maxsize) -> None:
        self._known_views.clear()
        # One after the other, so that at most one of the four matrices exists twice at a time.
        for number, vectors_SP in enumerate(self._vectors):
            num_rows = min(max(len(vectors_SP), at_least), at_most)
            if num_rows != len(vectors_SP):
                self._vectors[number] = _resized(vectors_SP, num_rows)


def _resized(vectors_SP: Tensor, num_rows: int) -> Tensor:
    """Return the first rows in a tensor of their own, and overwrite them with zeros where they were."""
    resized_SP = vectors_SP.new_zeros(num_rows, vectors_SP.shape[1])
    num_kept = min(num_rows, len(vectors_SP))
    resized_SP[:num_kept].copy_(vectors_SP[:num_kept])
    vectors_SP.zero_()
    return resized_SP
