"""How an attempt used the rows of a job's file, and the sentences that tell its tenant."""

from __future__ import annotations

from typing import Literal

from core.domain.values import Frozen

DatasetName = Literal["training", "validation"]
FILE_FIELDS: dict[DatasetName, str] = {"training": "training_file", "validation": "validation_file"}


class DatasetCounts(Frozen):
    """`num_examples` rows are used. `num_truncated` lost their tail; `num_dropped` had nothing left to learn.

    `num_left_out_turns` answers are not learnt, because a server would not send the base the same context.
    """

    num_examples: int
    num_truncated: int
    num_dropped: int
    num_left_out_turns: int


def describe_omissions(counts: DatasetCounts, *, file: DatasetName, max_seq_len: int) -> str | None:
    """Return a warning about the parts of a file that are not trained on, or None."""
    told = []
    if counts.num_truncated:
        told.append(
            f"{counts.num_truncated} rows of the {file} file are longer than max_seq_len={max_seq_len} tokens and were "
            "truncated."
        )
    if counts.num_dropped:
        told.append(f"{counts.num_dropped} rows of the {file} file had nothing to learn and were dropped.")
    if counts.num_left_out_turns:
        told.append(
            f"{counts.num_left_out_turns} answers of the {file} file are left out of the loss: the base's chat "
            "template writes them in a context that a server would not give it."
        )
    return " ".join(told) or None


def explain_nothing_to_learn(*, max_seq_len: int, num_left_out_turns: int) -> str:
    """Say what to change when no row of a file has a learnt token."""
    if num_left_out_turns:
        return (
            f"{num_left_out_turns} answers are left out: the base's chat template writes them in a context that a "
            "server would not give it. A base that always thinks learns answers that begin with <think>."
        )
    return f"No answer begins within max_seq_len={max_seq_len}: raise it."


def place_in_file(file: DatasetName, line: int, path: str = "") -> str:
    """Say where in a job's files something is."""
    return f"Line {line} of the {file} file" + (f", {path}" if path else "")
