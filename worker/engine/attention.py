"""Attention of a packed stream: every sequence attends to itself alone, in a kernel call of its own.

A block-diagonal mask would multiply other tenants' values by zero, and zero times NaN is NaN; separate calls cannot
meet. Shapes: H query heads, G key/value heads, T rows of the stream, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from worker.engine.packing import PackedSequence

IMPLEMENTATION = "espalier_packed"


def attend_packed(
    _module: Any,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    _mask: Tensor | None,
    *,
    sequences: tuple[PackedSequence, ...],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Return [1, T, H, D]. `sequences` reaches here through the decoder's keyword arguments."""
    lengths = [sequence.end - sequence.start for sequence in sequences]
    pieces = zip(*(torch.split(rows, lengths, dim=2) for rows in (query_1HTD, key_1GTD, value_1GTD)), strict=True)
    is_grouped = query_1HTD.shape[1] != key_1GTD.shape[1]
    outputs = [
        functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_window_mask(query, sliding_window),
            is_causal=not _exceeds(query, sliding_window),
            scale=scaling,
            enable_gqa=is_grouped,
        )
        for query, key, value in pieces
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _exceeds(query: Tensor, window: int | None) -> bool:
    return window is not None and query.shape[2] > window


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """Return the band [L, L] of a sliding window, or None where plain causal attention says the same."""
    if window is None or not _exceeds(query, window):
        return None
    length = query.shape[2]
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return ones.tril() & ones.triu(1 - window)


AttentionInterface.register(IMPLEMENTATION, attend_packed)
