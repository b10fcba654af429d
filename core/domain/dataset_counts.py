"""What became of the rows of a job's file when an attempt tokenised it, and how the job's tenant is told."""

from __future__ import annotations

from typing import Literal

from core.domain.training import Frozen

DatasetName = Literal["training", "validation"]


class DatasetCounts(Frozen):
    """`num_examples` rows are used. `num_truncated` lost their tail; `num_dropped` had nothing left to learn.

    `num_left_out_turns` counts assistant turns that stay out of the loss.
    """

    num_examples: int
    num_truncated: int
    num_dropped: int
    num_left_out_turns: int = 0


def describe_loss(counts: DatasetCounts, *, file: DatasetName, max_seq_len: int) -> str | None:
    """Return the warning about a file of which something is not trained on, or None."""
    told = []
    if counts.num_truncated:
        told.append(
            f"{counts.num_truncated} rows of the {file} file are longer than max_seq_len={max_seq_len} tokens and were "
            f"truncated; {counts.num_dropped} of them had nothing left to learn and were dropped."
        )
    elif counts.num_dropped:
        told.append(f"{counts.num_dropped} rows of the {file} file had nothing to learn and were dropped.")
    if counts.num_left_out_turns:
        told.append(f"{counts.num_left_out_turns} assistant turns of the {file} file are left out of the loss.")
    return " ".join(told) or None
