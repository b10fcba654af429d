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
from itertools import islice, pairwise

from core.domain.datasets.answers import AnswerFinder, Answers
from core.domain.datasets.rendering import Rendering, Span, render_conversation
from core.domain.datasets.tokenizers import BaseTokenizer, Encoding, RenderingError
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


@dataclass(frozen=True)
class _Cutting:
    """A conversation that is being tokenised, and where its text is cut so far."""

    rendering: Rendering
    answers: Answers
    cuts: set[int]

    @property
    def borders(self) -> list[int]:
        return sorted(self.cuts | {0, len(self.rendering.text)})

    @property
    def pieces(self) -> list[str]:
        return [self.rendering.text[start:end] for start, end in pairwise(self.borders)]


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
        (made,) = self.tokenize_all([example])
        if isinstance(made, RenderingError):
            raise made
        return made

    def tokenize_all(self, examples: Sequence[ChatExample]) -> list[TokenizedConversation | RenderingError]:
        """Return each whole conversation, or why it is refused. The tokenizer is called for all of them together.

        It is called again only for those that must be cut.
        """
        made: dict[int, TokenizedConversation | RenderingError] = {}
        open_cuts: dict[int, _Cutting] = {}
        for index, example in enumerate(examples):
            try:
                rendering = render_conversation(self._tokenizer, example)
                open_cuts[index] = _Cutting(rendering, self._finder.find(example, rendering), set())
            except RenderingError as error:
                made[index] = error
        while open_cuts:
            pieces = [piece for cutting in open_cuts.values() for piece in cutting.pieces]
            encodings = iter(self._tokenizer.encode(pieces))
            for index, cutting in tuple(open_cuts.items()):
                found = list(islice(encodings, len(cutting.borders) - 1))
                try:
                    if (conversation := self._take(cutting, found)) is not None:
                        made[index] = conversation
                except RenderingError as error:
                    made[index] = error
                if index in made:
                    del open_cuts[index]
        return [made[index] for index in range(len(examples))]

    def _take(self, cutting: _Cutting, encodings: Sequence[Encoding]) -> TokenizedConversation | None:
        """Return the conversation, or None if it needs more cuts, which are then added."""
        tokens = _join(cutting.borders, encodings)
        answers = cutting.answers
        needed = _find_joints(tokens, answers.spans) | self._find_spelt_controls(cutting.rendering, tokens)
        if not needed:
            return _mark_labels(tokens, answers)
        if needed <= cutting.cuts:
            raise RenderingError("A message spells a control token of the base that cannot be written as text.")
        cutting.cuts.update(needed)
        return None

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


def _join(borders: Sequence[int], encodings: Sequence[Encoding]) -> _Positions:
    """Return the tokens of the pieces between the borders, at their places in the whole text."""
    token_ids: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    for border, encoding in zip(borders[:-1], encodings, strict=True):
        token_ids += encoding.token_ids
        starts += [border + start for start, _ in encoding.offsets]
        ends += [border + end for _, end in encoding.offsets]
    if not token_ids:
        raise RenderingError("The base's tokenizer makes no token of this conversation.")
    if starts != sorted(starts):
        raise RenderingError("The base's tokenizer reorders this conversation's text.")
    return _Positions(token_ids, starts, ends)


def _mark_labels(tokens: _Positions, answers: Answers) -> TokenizedConversation:
    is_label = [False] * len(tokens.token_ids)
    for span in answers.spans:
        first, end = bisect_left(tokens.starts, span.start), bisect_left(tokens.starts, span.end)
        is_label[first:end] = [True] * (end - first)
    is_label[0] = False  # no token before it predicts the first token
    return TokenizedConversation(tokens.token_ids, is_label, answers.num_left_out)


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
