"""From conversations to tokens and labels, as the base's own chat template writes them.

Labels are the assistant's words of weight 1 and what ends the turn, nothing else: not the role header, not white space
after the turn. A tenant's text never becomes a control token: where it spells one, it is tokenised as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.domain.datasets import ChatExample, ProblemError, parse_example
from worker.engine import Example
from worker.trainer.failures import JobFaultError
from worker.trainer.rendering import Rendering, Span, render_conversation


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


def tokenize_dataset(tokenizer: Any, examples: Iterable[ChatExample], *, max_seq_len: int) -> TokenizedDataset:
    """Tokenise every conversation, keeping the head of long ones.

    Raises JobFaultError naming the row, or when nothing is left to learn.
    """
    conversations = ConversationTokenizer(tokenizer)
    kept: list[Example] = []
    num_truncated = num_dropped = 0
    for number, example in enumerate(examples, start=1):
        try:
            whole = conversations.tokenize(example)
        except JobFaultError as error:
            raise JobFaultError(f"Line {number}: {error}") from error
        num_truncated += whole.num_tokens > max_seq_len
        cut = Example(token_ids=whole.token_ids[:max_seq_len], is_label=whole.is_label[:max_seq_len])
        if cut.num_labels:
            kept.append(cut)
        else:
            num_dropped += 1
    if not kept:
        raise JobFaultError(f"No row has anything left to learn within max_seq_len={max_seq_len}; raise it.")
    return TokenizedDataset(examples=tuple(kept), num_truncated=num_truncated, num_dropped=num_dropped)


class ConversationTokenizer:
    """Tokenises conversations with a base's tokenizer (a transformers one that knows its offsets).

    A conversation is tokenised whole, as a serving stack does, and cut in two places only: where a token would join a
    prompt to its answer (a serving stack never sees them joined), and inside a control token that a tenant's text
    spells, which makes plain text of it. Control tokens are those that the tokenizer marks as special; other added
    tokens (thinking tags, say) are words that a tenant may write.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._control_ids = np.asarray(sorted(special), dtype=np.int64)
        endings = [re.escape(token) for token in sorted(special.values(), key=len, reverse=True)]
        # Some templates write white space before the end-of-sequence token: what must be said before it is learnt too.
        if tokenizer.eos_token:
            endings.insert(0, rf"\s*{re.escape(tokenizer.eos_token)}")
        self._ending = re.compile("|".join(endings))

    def tokenize(self, example: ChatExample) -> Example:
        """Return the whole conversation as token ids [L] and label marks [L]. Raises JobFaultError."""
        rendering = render_conversation(self._tokenizer, example)
        answers = [
            Span(span.start, self._find_turn_end(rendering.text, span.end))
            for message, span in zip(example.messages, rendering.contents, strict=True)
            if message.role == "assistant" and message.weight
        ]
        token_ids, starts = self._encode_apart(rendering, answers)
        is_label = np.zeros(len(token_ids), dtype=np.bool_)
        for answer in answers:
            is_label |= (starts >= answer.start) & (starts < answer.end)
        is_label[0] = False  # nothing comes before the first token to predict it from
        return Example(token_ids=token_ids, is_label=is_label)

    def _find_turn_end(self, text: str, content_end: int) -> int:
        """Return where the control token that closes a turn ends; the words' own end where there is none."""
        ending = self._ending.match(text, content_end)
        return ending.end() if ending else content_end

    def _encode_apart(
        self, rendering: Rendering, answers: list[Span]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return token ids and where each token starts, both [L], once every cut has been made."""
        cuts: set[int] = set()
        while True:
            token_ids, starts, ends = self._encode(rendering.text, cuts)
            needed = _find_joints(starts, ends, answers)
            needed |= self._find_spelt_controls(rendering, token_ids, starts, ends)
            if not needed:
                return token_ids, starts
            if needed <= cuts:
                raise JobFaultError("A message spells a control token of the base that cannot be written as text.")
            cuts |= needed

    def _encode(
        self, text: str, cuts: set[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return token ids and each token's start and end in the text, all [L]."""
        borders = sorted(cuts | {0, len(text)})
        pieces = [text[start:end] for start, end in pairwise(borders)]
        encoding = self._tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        token_ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoding["input_ids"]])
        offsets = [
            np.asarray(piece, dtype=np.int64).reshape(-1, 2) + start
            for start, piece in zip(borders[:-1], encoding["offset_mapping"], strict=True)
        ]
        positions = np.concatenate(offsets)
        return token_ids, positions[:, 0], positions[:, 1]

    def _find_spelt_controls(
        self,
        rendering: Rendering,
        token_ids: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
    ) -> set[int]:
        """Return a cut inside every control token that takes words of a message."""
        is_content = np.zeros(len(rendering.text), dtype=np.bool_)
        for span in rendering.contents:
            is_content[span.start : span.end] = True
        cuts = set()
        for index in np.flatnonzero(np.isin(token_ids, self._control_ids)):
            # Some control tokens take the white space beside them; a serving stack does that too.
            taken = rendering.text[starts[index] : ends[index]]
            start = int(starts[index]) + len(taken) - len(taken.lstrip())
            if is_content[start : start + len(taken.strip())].any():
                cuts.add(start + 1)
        return cuts


def _find_joints(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], answers: list[Span]) -> set[int]:
    """Return the starts of answers that lie within a token."""
    return {answer.start for answer in answers if ((starts < answer.start) & (ends > answer.start)).any()}
