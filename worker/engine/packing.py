"""The packed stream of one fused step: whole sequences side by side, sorted by slot, each an island.

Shapes: T tokens of the step, M rows with a label. Positions restart with every sequence, and the label shift is per
sequence: row t predicts token t+1 of its own sequence, so a sequence's last row has no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.engine.examples import Example


@dataclass(frozen=True)
class PackedSequence:
    """One example in the stream: its rows [start, end) and what its dropout is seeded with."""

    start: int
    end: int
    dropout_key: int


@dataclass(frozen=True)
class Group:
    """One slot's rows [start, end) of the stream, and its label rows [label_start, label_end) of the M."""

    slot_index: int
    start: int
    end: int
    label_start: int
    label_end: int
    sequences: tuple[PackedSequence, ...]

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class PackedBatch:
    token_ids_1T: Tensor
    positions_1T: Tensor
    label_rows_M: Tensor
    labels_M: Tensor
    groups: tuple[Group, ...]

    @property
    def sequences(self) -> tuple[PackedSequence, ...]:
        return tuple(sequence for group in self.groups for sequence in group.sequences)


@dataclass(frozen=True, eq=False)
class GroupExamples:
    """What one slot contributes to a step; `dropout_keys` has one number an example."""

    slot_index: int
    examples: Sequence[Example]
    dropout_keys: Sequence[int]


def pack(parts: Sequence[GroupExamples], device: torch.device) -> PackedBatch:
    """Lay the examples side by side and copy them to the device once."""
    tokens, positions, rows, labels, groups = [], [], [], [], []
    start = label_start = 0
    for part in parts:
        sequences, end, label_end = [], start, label_start
        for example, key in zip(part.examples, part.dropout_keys, strict=True):
            length = example.num_tokens
            targets = np.flatnonzero(example.is_label[1:])
            tokens.append(example.token_ids)
            positions.append(np.arange(length))
            rows.append(targets + end)
            labels.append(example.token_ids[1:][targets])
            sequences.append(PackedSequence(end, end + length, key))
            end += length
            label_end += len(targets)
        groups.append(Group(part.slot_index, start, end, label_start, label_end, tuple(sequences)))
        start, label_start = end, label_end
    return PackedBatch(
        token_ids_1T=_to_device(tokens, device)[None],
        positions_1T=_to_device(positions, device)[None],
        label_rows_M=_to_device(rows, device),
        labels_M=_to_device(labels, device),
        groups=tuple(groups),
    )


def _to_device(pieces: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(device, non_blocking=True)
