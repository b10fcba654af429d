"""Attention of a packed stream: every sequence attends to itself alone.

A block-diagonal mask does not keep tenants apart: it multiplies other tenants' values by zero, and zero times NaN is
NaN. Here sequences are members of a batch, or segments of a variable-length kernel. In both cases no value of one
sequence enters a product of another.

Shapes: H query heads, G key/value heads, T rows of the stream, D head size, Q sequences of one length L.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from worker.engine.packing import SequenceLayout

IMPLEMENTATION = "espalier_packed"


def attend_packed(
    _module: Any,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    _mask: Tensor | None,
    *,
    sequences: SequenceLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Return [1, T, H, D]. The decoder passes its keyword argument `sequences` on to here."""
    qkv = (query_1HTD, key_1GTD, value_1GTD)
    if query_1HTD.is_cuda and query_1HTD.dtype in (torch.bfloat16, torch.float16):
        return _attend_segments(qkv, sequences, scaling=scaling, window=sliding_window), None
    return _attend_batches(qkv, sequences, scaling=scaling, window=sliding_window), None


def _attend_segments(
    qkv: tuple[Tensor, Tensor, Tensor], sequences: SequenceLayout, *, scaling: float | None, window: int | None
) -> Tensor:
    query_THD, key_TGD, value_TGD = (rows[0].transpose(0, 1).contiguous() for rows in qkv)
    output_THD = varlen_attn(
        query_THD,
        key_TGD,
        value_TGD,
        sequences.offsets,
        sequences.offsets,
        sequences.max_length,
        sequences.max_length,
        scale=scaling,
        # How many rows before and after a row it sees. A model's window includes the row itself, the kernel's does not.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_THD.shape[1] != key_TGD.shape[1],
        num_splits=1,  # with more splits, a sequence's result depends on its neighbours' lengths
    )
    assert isinstance(output_THD, Tensor)
    return output_THD[None]


def _attend_batches(
    qkv: tuple[Tensor, Tensor, Tensor], sequences: SequenceLayout, *, scaling: float | None, window: int | None
) -> Tensor:
    """Attend batch by batch: neighbouring sequences of equal length are one kernel call."""
    is_grouped = qkv[0].shape[1] != qkv[1].shape[1]
    outputs = []
    for batch in sequences.batches:
        start, count, length = batch.start, batch.count, batch.length
        # From rows of the stream [heads, Q * L, D] to a batch of sequences [Q, heads, L, D]; views, not copies.
        query, key, value = (
            rows[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1) for rows in qkv
        )
        is_windowed = window is not None and length > window
        output_QHLD = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_window_mask(length, window, query.device) if is_windowed else None,
            is_causal=not is_windowed,
            scale=scaling,
            enable_gqa=is_grouped,
        )
        outputs.append(output_QHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return the band [L, L] of a sliding window: a row sees itself and the `window` - 1 rows before it."""
    assert window is not None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


AttentionInterface.register(IMPLEMENTATION, attend_packed)
