"""The packed stream of one fused step: whole sequences side by side, slot by slot, without padding.

Positions restart with every sequence. The label shift is per sequence: row t predicts token t+1 of its own sequence, so
a sequence's last row has no label. Only rows with a label reach the head.

Shapes: T tokens of the step, M rows with a label, Q sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.engine.examples import DrawnExample


@dataclass(frozen=True)
class PackedSequence:
    """One example in the stream: its rows [start, end), the seed of its dropout, and its number of labels."""

    start: int
    end: int
    dropout_key: int
    num_labels: int


@dataclass(frozen=True)
class Group:
    """One slot's rows [start, end) of the stream. Its label rows follow those of the groups before it."""

    start: int
    end: int
    sequences: tuple[PackedSequence, ...]

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class EqualSequences:
    """`count` neighbouring sequences of one length, from row `start` of the stream on."""

    start: int
    count: int
    length: int


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Where the stream's sequences lie, in the two forms that attention needs.

    `batches` are stretches of equally long neighbours; `offsets` [Q + 1] int32 are all sequences' borders.
    """

    batches: tuple[EqualSequences, ...]
    offsets: Tensor
    max_length: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> SequenceLayout:
        batches: list[EqualSequences] = []
        start = 0
        for length in lengths:
            if batches and batches[-1].length == length:
                batches[-1] = EqualSequences(batches[-1].start, batches[-1].count + 1, length)
            else:
                batches.append(EqualSequences(start, 1, length))
            start += length
        offsets = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(device, non_blocking=True)
        return cls(tuple(batches), offsets, max(lengths))


@dataclass(frozen=True, eq=False)
class PackedBatch:
    token_ids_1T: Tensor
    positions_1T: Tensor
    label_rows_M: Tensor
    labels_M: Tensor
    groups: tuple[Group, ...]
    sequences: SequenceLayout

    @property
    def num_tokens(self) -> int:
        return self.token_ids_1T.shape[1]


def pack(parts: Sequence[Sequence[DrawnExample]], device: torch.device) -> PackedBatch:
    """Lay the examples side by side, slot by slot, and copy each tensor to the device once."""
    tokens, positions, rows, labels, groups = [], [], [], [], []
    start = 0
    for part in parts:
        sequences, end = [], start
        for drawn in part:
            example = drawn.example
            length = example.num_tokens
            targets = np.flatnonzero(example.is_label[1:])  # rows whose next token is a label
            tokens.append(example.token_ids)
            positions.append(np.arange(length))
            rows.append(targets + end)
            labels.append(example.token_ids[1:][targets])
            sequences.append(PackedSequence(end, end + length, drawn.dropout_key, len(targets)))
            end += length
        groups.append(Group(start, end, tuple(sequences)))
        start = end
    return PackedBatch(
        token_ids_1T=_to_device(tokens, device)[None],
        positions_1T=_to_device(positions, device)[None],
        label_rows_M=_to_device(rows, device),
        labels_M=_to_device(labels, device),
        groups=tuple(groups),
        sequences=SequenceLayout.of([len(each) for each in tokens], device),
    )


def _to_device(pieces: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(device, non_blocking=True)
