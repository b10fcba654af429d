"""A job's dataset in the engine's form: every row tokenised by the rules of core.domain.datasets, and cut to length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.domain.dataset_counts import DatasetCounts, DatasetName
from core.domain.datasets import ChatExample, Problem, ProblemError, parse_example
from core.domain.datasets.tokenizers import BaseTokenizer, RenderingError
from core.domain.datasets.tokens import ConversationTokenizer, TokenizedConversation
from worker.engine import Example
from worker.trainer.failures import JobFaultError


@dataclass(frozen=True)
class TokenizedDataset:
    """`num_truncated` rows lost their tail; `num_dropped` of them had nothing left to learn."""

    examples: tuple[Example, ...]
    num_truncated: int
    num_dropped: int
    num_left_out_turns: int = 0

    @property
    def counts(self) -> DatasetCounts:
        return DatasetCounts(
            num_examples=len(self.examples),
            num_truncated=self.num_truncated,
            num_dropped=self.num_dropped,
            num_left_out_turns=self.num_left_out_turns,
        )


@dataclass(frozen=True)
class NumberedExample:
    """A conversation and the line of its file, of which 1 is the first."""

    line_number: int
    example: ChatExample


def read_examples(path: Path, *, file: DatasetName = "training") -> Iterator[NumberedExample]:
    """Yield the conversations of a JSON Lines file. Raises JobFaultError naming file, line and field."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                example = parse_example(line.removesuffix(b"\n"), line_number=number)
            except ProblemError as error:
                raise _blame_row(error.problem, file) from error
            yield NumberedExample(number, example)


def tokenize_dataset(
    tokenizer: BaseTokenizer,
    examples: Iterable[NumberedExample],
    *,
    max_seq_len: int,
    file: DatasetName = "training",
) -> TokenizedDataset:
    """Tokenise every conversation, keeping the head of long ones.

    Raises JobFaultError naming file and line, or the file when nothing is left to learn.
    """
    conversations = ConversationTokenizer(tokenizer)
    kept: list[Example] = []
    num_truncated = num_dropped = 0
    for numbered in examples:
        try:
            whole = conversations.tokenize(numbered.example)
        except RenderingError as error:
            line = numbered.line_number
            raise JobFaultError(f"Line {line} of the {file} file: {error}", file=file, line_number=line) from error
        num_truncated += whole.num_tokens > max_seq_len
        cut = whole.cut(max_seq_len)
        if cut.num_labels:
            kept.append(as_engine_example(cut))
        else:
            num_dropped += 1
    if not kept and not num_dropped:
        raise JobFaultError(f"The {file} file has no rows.", file=file)
    if not kept:
        told = f"No row of the {file} file has anything left to learn within max_seq_len={max_seq_len}; raise it."
        raise JobFaultError(told, file=file)
    return TokenizedDataset(examples=tuple(kept), num_truncated=num_truncated, num_dropped=num_dropped)


def _blame_row(problem: Problem, file: DatasetName) -> JobFaultError:
    where = f"Line {problem.line} of the {file} file" + (f", {problem.path}" if problem.path else "")
    told = f"{where}: {problem.message} {problem.hint}"
    return JobFaultError(told, file=file, line_number=problem.line, field=problem.path or None)


def as_engine_example(conversation: TokenizedConversation) -> Example:
    """Return a conversation as token ids [L] and label marks [L]."""
    return Example(
        token_ids=np.asarray(conversation.token_ids, dtype=np.int64),
        is_label=np.asarray(conversation.is_label, dtype=np.bool_),
    )
