"""Tokens and labels of conversations, as the base's own chat template writes them.

The labels are the assistant's words in turns of weight 1, from the end of a server's prompt on, and what ends the turn.
The role header and white space after the turn are not labels. A tenant's text never becomes a control token: text that
spells one is tokenised as plain text. The trainer and previews of a file both use this module, so what a preview shows
is what is learnt.
"""

from __future__ import annotations

import datetime as dt
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from core.domain.datasets.answers import AnswerFinder
from core.domain.datasets.rendering import Rendering, Span, render_conversation
from core.domain.datasets.tokenizers import BaseTokenizer, RenderingError
from core.domain.datasets.values import ChatExample


@dataclass(frozen=True)
class TokenizedConversation:
    """Token ids and label marks of one conversation, of equal length.

    `num_left_out_turns` counts the answers of weight 1 that are not learnt. core.domain.datasets.answers says which
    these are.
    """

    token_ids: list[int]
    is_label: list[bool]
    num_left_out_turns: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_labels(self) -> int:
        return sum(self.is_label)

    def cut(self, max_seq_len: int) -> TokenizedConversation:
        """Return the head that is trained on."""
        return replace(self, token_ids=self.token_ids[:max_seq_len], is_label=self.is_label[:max_seq_len])


@dataclass(frozen=True)
class _Positions:
    """Token ids, and where each token starts and ends in the text. Starts never decrease."""

    token_ids: list[int]
    starts: list[int]
    ends: list[int]


class ConversationTokenizer:
    """Tokenises conversations with a base's tokenizer.

    A conversation is tokenised as a whole, as a serving stack does it, and cut in two kinds of places only. One is
    where a token would join a prompt to its answer, because a serving stack never sees them joined. The other is inside
    a control token that a tenant's text spells, so that it becomes plain text. Control tokens are those that the
    tokenizer marks as special. Other added tokens (such as thinking tags) are words that a tenant may write. A template
    that writes the date writes that of `now`, however long the rows take and whenever they are tokenised again.
    """

    def __init__(self, tokenizer: BaseTokenizer, *, now: dt.datetime | None = None) -> None:
        self._tokenizer = tokenizer.at(now or dt.datetime.now())  # noqa: DTZ005 (the local time, as servers give it)
        self._finder = AnswerFinder(self._tokenizer)

    def check_template(self) -> None:
        """Raise RenderingError, in words for an operator, if no answer can be learnt together with its end."""
        self._finder.check_template()

    def tokenize(self, example: ChatExample) -> TokenizedConversation:
        """Return the whole conversation. Raises RenderingError."""
        rendering = render_conversation(self._tokenizer, example)
        answers = self._finder.find(example, rendering)
        tokens = self._encode_apart(rendering, answers.spans)
        is_label = [False] * len(tokens.token_ids)
        for span in answers.spans:
            first, end = bisect_left(tokens.starts, span.start), bisect_left(tokens.starts, span.end)
            is_label[first:end] = [True] * (end - first)
        is_label[0] = False  # no token before it predicts the first token
        return TokenizedConversation(tokens.token_ids, is_label, answers.num_left_out)

    def _encode_apart(self, rendering: Rendering, answers: Sequence[Span]) -> _Positions:
        """Return the tokens after all cuts."""
        cuts: set[int] = set()
        while True:
            tokens = self._encode(rendering.text, cuts)
            needed = _find_joints(tokens, answers) | self._find_spelt_controls(rendering, tokens)
            if not needed:
                return tokens
            if needed <= cuts:
                raise RenderingError("A message spells a control token of the base that cannot be written as text.")
            cuts |= needed

    def _encode(self, text: str, cuts: set[int]) -> _Positions:
        borders = sorted(cuts | {0, len(text)})
        token_ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        pieces = [text[start:end] for start, end in pairwise(borders)]
        for border, encoding in zip(borders[:-1], self._tokenizer.encode(pieces), strict=True):
            token_ids += encoding.token_ids
            starts += [border + start for start, _ in encoding.offsets]
            ends += [border + end for _, end in encoding.offsets]
        if not token_ids:
            raise RenderingError("The base's tokenizer makes no token of this conversation.")
        if starts != sorted(starts):
            raise RenderingError("The base's tokenizer reorders this conversation's text.")
        return _Positions(token_ids, starts, ends)

    def _find_spelt_controls(self, rendering: Rendering, tokens: _Positions) -> set[int]:
        """Return a cut inside every control token that covers words of a message."""
        pieces = sorted((span for words in rendering.words for span in words.pieces), key=lambda span: span.start)
        piece_ends = [span.end for span in pieces]
        controls = self._tokenizer.control_tokens
        cuts = set()
        for token_id, token_start, token_end in zip(tokens.token_ids, tokens.starts, tokens.ends, strict=True):
            if token_id not in controls:
                continue
            # Some control tokens include the white space beside them. A serving stack does that too.
            taken = rendering.text[token_start:token_end]
            start = token_start + len(taken) - len(taken.lstrip())
            end = start + len(taken.strip())
            index = bisect_right(piece_ends, start)  # the first words that end after the token's start
            if index < len(pieces) and pieces[index].start < end:
                cuts.add(start + 1)
        return cuts


def _find_joints(tokens: _Positions, answers: Sequence[Span]) -> set[int]:
    """Return the starts of answers that lie within a token."""
    joints = set()
    for answer in answers:
        index = bisect_left(tokens.starts, answer.start) - 1
        # The tokens of one character have the same start. If one of them reaches over the joint, that is enough.
        while index >= 0 and tokens.ends[index] <= answer.start and tokens.starts[index - 1] == tokens.starts[index]:
            index -= 1
        if index >= 0 and tokens.ends[index] > answer.start:
            joints.add(answer.start)
    return joints
