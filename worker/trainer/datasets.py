"""A job's dataset in the engine's form: every row tokenised by the rules of core.domain.datasets, and cut to length."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.domain.dataset_counts import DatasetCounts, DatasetName, explain_nothing_to_learn, place_in_file
from core.domain.datasets import ChatExample, Problem, ProblemError, iterate_rows, parse_example
from core.domain.datasets.tokenizers import BaseTokenizer, RenderingError
from core.domain.datasets.tokens import ConversationTokenizer, TokenizedConversation
from worker.engine import Example
from worker.trainer.failures import JobFaultError


@dataclass(frozen=True)
class TokenizedDataset:
    """The rows that are trained on, and the counts of all rows."""

    examples: tuple[Example, ...]
    counts: DatasetCounts


@dataclass(frozen=True)
class NumberedExample:
    """A conversation and the number of its line in the file, from 1."""

    line_number: int
    example: ChatExample


def read_examples(path: Path, *, file: DatasetName = "training") -> Iterator[NumberedExample]:
    """Yield the conversations of a JSON Lines file. Raises JobFaultError naming file, line and field."""
    with path.open("rb") as lines:
        for number, line in iterate_rows(lines):
            try:
                example = parse_example(line, line_number=number)
            except ProblemError as error:
                raise _blame_row(error.problem, file) from error
            yield NumberedExample(number, example)


def tokenize_dataset(
    tokenizer: BaseTokenizer,
    examples: Iterable[NumberedExample],
    *,
    max_seq_len: int,
    file: DatasetName = "training",
    now: dt.datetime | None = None,
) -> TokenizedDataset:
    """Tokenise every conversation and cut long ones to their head. `now` is the date that the template may write.

    Raises JobFaultError naming file and line, or only the file if nothing is left to learn.
    """
    conversations = ConversationTokenizer(tokenizer, now=now)
    kept: list[Example] = []
    num_truncated = num_dropped = num_left_out_turns = 0
    for numbered in examples:
        whole = _tokenize(conversations, numbered, file)
        num_truncated += whole.num_tokens > max_seq_len
        num_left_out_turns += whole.num_left_out_turns
        cut = whole.cut(max_seq_len)
        if cut.num_labels:
            kept.append(as_engine_example(cut))
        else:
            num_dropped += 1
    if not kept and not num_dropped:
        raise JobFaultError(f"The {file} file has no rows.", file=file)
    if not kept:
        why = explain_nothing_to_learn(max_seq_len=max_seq_len, num_left_out_turns=num_left_out_turns)
        raise JobFaultError(f"No row of the {file} file has anything to learn. {why}", file=file)
    counts = DatasetCounts(
        num_examples=len(kept),
        num_truncated=num_truncated,
        num_dropped=num_dropped,
        num_left_out_turns=num_left_out_turns,
    )
    return TokenizedDataset(tuple(kept), counts)


def _tokenize(
    conversations: ConversationTokenizer, numbered: NumberedExample, file: DatasetName
) -> TokenizedConversation:
    try:
        return conversations.tokenize(numbered.example)
    except RenderingError as error:
        line = numbered.line_number
        raise JobFaultError(f"{place_in_file(file, line)}: {error}", file=file, line_number=line) from error


def _blame_row(problem: Problem, file: DatasetName) -> JobFaultError:
    told = f"{place_in_file(file, problem.line, problem.path)}: {problem.message} {problem.hint}"
    return JobFaultError(told, file=file, line_number=problem.line, field=problem.path or None)


def as_engine_example(conversation: TokenizedConversation) -> Example:
    """Return a conversation as token ids [L] and label marks [L]."""
    return Example(
        token_ids=np.asarray(conversation.token_ids, dtype=np.int64),
        is_label=np.asarray(conversation.is_label, dtype=np.bool_),
    )
