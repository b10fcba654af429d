"""Runs: stretches of the packed stream whose LoRA products are taken together.

A run's slots belong to one bank and have one kind: they scale alike, all drop or none does, and all begin an optimizer
batch or none does. How products are taken together depends on the device:

- batched (CPU): neighbouring rows of the bank with equally many rows of the stream each. Every operand is a view. A
  slot that fits no neighbour is a run of its own.
- grouped (CUDA): all slots of the bank that have one kind, however many rows each of them has.

Either way each slot's rows are multiplied with that slot's own matrices alone, so a NaN in one cannot reach another.

Shapes: S slots of the run, t rows of it, r rows of each slot where they are equally many, K in, N out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from worker.engine.banks import Bank, LoraStack
from worker.engine.packing import Group
from worker.engine.seeds import stable_hash
from worker.engine.slots import Slot


class _Kind(NamedTuple):
    """What slots must share to be one run; it also orders them in the stream.

    `is_first` says that the slot begins an optimizer batch, so that its gradients replace those of the last one.
    """

    bank_index: int
    is_first: bool
    has_dropout: bool
    scale: float


@dataclass(frozen=True, eq=False)
class SlotRows:
    """One slot's part of a step; `is_training` is False when it is only evaluated, without dropout."""

    slot: Slot
    group: Group
    is_training: bool = True

    @property
    def kind(self) -> _Kind:
        return _kind_of(self.slot, is_training=self.is_training)


@dataclass(frozen=True, eq=False)
class Run:
    """Slots whose products are taken together: `bank_rows` of their bank with `rows` of the stream.

    `offsets` [S] (int32, where each slot's rows end) is None where every slot has equally many rows.
    """

    parts: tuple[SlotRows, ...]
    kind: _Kind
    bank_rows: slice | Tensor
    rows: slice
    offsets: Tensor | None

    @property
    def bank(self) -> Bank:
        return self.parts[0].slot.row.bank

    def adapted(self, siblings: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Return those siblings that have LoRA here: together, or one by one where each drops other inputs."""
        names = tuple(name for name in siblings if name in self.bank.layout.columns)
        if self.kind.has_dropout:
            return [(name,) for name in names]
        return [names] if names else []

    def weights(self, names: tuple[str, ...], dtype: torch.dtype) -> LoraStack:
        stack = self.bank.weights(self.bank_rows, names)
        if stack.A_SJK.dtype == dtype:
            return stack
        return LoraStack(stack.A_SJK.to(dtype), tuple(Bt_SRN.to(dtype) for Bt_SRN in stack.Bts_SRN))

    def collect_grads(self, names: tuple[str, ...], found: LoraStack) -> None:
        """Add these, times the scale, to the optimizer batch's gradients; its first ones replace the last batch's."""
        self.bank.collect_grads(self.bank_rows, names, found, factor=self.kind.scale, is_first=self.kind.is_first)

    def multiply(self, x_tK: Tensor, matrices_SKN: Tensor) -> Tensor:
        """Return each slot's rows times its own matrix [t, N]."""
        if self.offsets is not None:
            return grouped_mm(x_tK, matrices_SKN, offs=self.offsets)
        num_slots, num_inputs, num_outputs = matrices_SKN.shape
        return torch.bmm(x_tK.view(num_slots, -1, num_inputs), matrices_SKN).view(-1, num_outputs)

    def add_product(self, y_tN: Tensor, h_tR: Tensor, matrices_SRN: Tensor) -> None:
        """Add scale times each slot's rows of h times its own matrix to its rows of y, in place."""
        if self.offsets is not None:
            y_tN.add_(grouped_mm(h_tR, matrices_SRN, offs=self.offsets), alpha=self.kind.scale)
            return
        num_slots, rank, num_outputs = matrices_SRN.shape
        y_SrN = y_tN.view(num_slots, -1, num_outputs)
        y_SrN.baddbmm_(h_tR.view(num_slots, -1, rank), matrices_SRN, alpha=self.kind.scale)

    def sum_outer(self, h_tR: Tensor, x_tK: Tensor) -> Tensor:
        """Return each slot's sum over its rows of h times x [S, R, K]."""
        if self.offsets is not None:
            return grouped_mm(h_tR.T, x_tK, offs=self.offsets)
        num_slots = len(self.parts)
        h_SrR, x_SrK = h_tR.view(num_slots, -1, h_tR.shape[1]), x_tK.view(num_slots, -1, x_tK.shape[1])
        return torch.bmm(h_SrR.transpose(1, 2), x_SrK)

    def drop(self, rows_tK: Tensor, name: str) -> Tensor:
        """Apply LoRA dropout. The mask depends only on the example, the epoch and the linear.

        So the backward, and a layer that is recomputed, get the same mask.
        """
        if not self.kind.has_dropout:
            return rows_tK
        factors_tK = torch.cat([self._factors(part, rows_tK, name) for part in self.parts])
        # Not by a product alone: a dropped number that is not finite would become NaN instead of zero.
        return torch.where(factors_tK > 0, rows_tK * factors_tK, 0)

    def _factors(self, part: SlotRows, rows_tK: Tensor, name: str) -> Tensor:
        probability, pieces = part.slot.row.adapter.dropout, []
        for sequence in part.group.sequences:
            generator = torch.Generator(rows_tK.device).manual_seed(stable_hash(sequence.dropout_key, name))
            shape = (sequence.end - sequence.start, rows_tK.shape[1])
            kept = torch.rand(shape, generator=generator, device=rows_tK.device) >= probability
            pieces.append((kept / (1 - probability)).to(rows_tK.dtype))
        return torch.cat(pieces)


def stream_order(slot: Slot) -> tuple[_Kind, int]:
    """Return where a training slot stands in the stream, so that slots that can be one run are neighbours."""
    return _kind_of(slot, is_training=True), slot.row.index


def make_runs(parts: Sequence[SlotRows], *, is_grouped: bool) -> tuple[Run, ...]:
    """Cut a step's parts, in stream order, into runs."""
    stretches: list[list[SlotRows]] = []
    for part in parts:
        if stretches and _continues(stretches[-1][-1], part, is_grouped=is_grouped):
            stretches[-1].append(part)
        else:
            stretches.append([part])
    return tuple(_make_run(stretch, is_grouped=is_grouped) for stretch in stretches)


def _kind_of(slot: Slot, *, is_training: bool) -> _Kind:
    adapter = slot.row.adapter
    return _Kind(slot.row.bank.index, slot.cursor.position == 0, is_training and adapter.dropout > 0, adapter.scale)


def _continues(last: SlotRows, part: SlotRows, *, is_grouped: bool) -> bool:
    is_neighbour = last.slot.row.index + 1 == part.slot.row.index and last.group.num_tokens == part.group.num_tokens
    return last.kind == part.kind and (is_grouped or is_neighbour)


def _make_run(parts: list[SlotRows], *, is_grouped: bool) -> Run:
    first, last, device = parts[0], parts[-1], parts[0].slot.row.weights_P.device
    offsets = torch.tensor([part.group.end - first.group.start for part in parts], dtype=torch.int32)
    indices = [part.slot.row.index for part in parts]
    is_contiguous = indices[-1] - indices[0] == len(parts) - 1
    return Run(
        parts=tuple(parts),
        kind=first.kind,
        bank_rows=(slice(indices[0], indices[-1] + 1) if is_contiguous else torch.tensor(indices, device=device)),
        rows=slice(first.group.start, last.group.end),
        offsets=offsets.to(device) if is_grouped else None,
    )
