"""A job's dataset in the engine's form: every row tokenised by the rules of core.domain.datasets, and cut to length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.domain.datasets import ChatExample, ProblemError, parse_example
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


def read_examples(path: Path) -> Iterator[ChatExample]:
    """Yield the conversations of a JSON Lines file. Raises JobFaultError naming the line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield parse_example(line.removesuffix(b"\n"), line_number=number)
            except ProblemError as error:
                raise JobFaultError(str(error)) from error


def tokenize_dataset(
    tokenizer: BaseTokenizer, examples: Iterable[ChatExample], *, max_seq_len: int
) -> TokenizedDataset:
    """Tokenise every conversation, keeping the head of long ones.

    Raises JobFaultError naming the row, or when nothing is left to learn.
    """
    conversations = ConversationTokenizer(tokenizer)
    kept: list[Example] = []
    num_truncated = num_dropped = 0
    for number, example in enumerate(examples, start=1):
        try:
            whole = conversations.tokenize(example)
        except RenderingError as error:
            raise JobFaultError(f"Line {number}: {error}") from error
        num_truncated += whole.num_tokens > max_seq_len
        cut = whole.cut(max_seq_len)
        if cut.num_labels:
            kept.append(as_engine_example(cut))
        else:
            num_dropped += 1
    if not kept:
        raise JobFaultError(f"No row has anything left to learn within max_seq_len={max_seq_len}; raise it.")
    return TokenizedDataset(examples=tuple(kept), num_truncated=num_truncated, num_dropped=num_dropped)


def as_engine_example(conversation: TokenizedConversation) -> Example:
    """Return a conversation as token ids [L] and label marks [L]."""
    return Example(
        token_ids=np.asarray(conversation.token_ids, dtype=np.int64),
        is_label=np.asarray(conversation.is_label, dtype=np.bool_),
    )
