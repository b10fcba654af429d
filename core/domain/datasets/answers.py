"""Which characters of a rendered conversation are learnt: in assistant turns, all that a server leaves to the model.

For each turn the template is asked as a server asks it: with the messages before the turn and the generation prompt.

| the text of an assistant turn | learnt? |
|---|---|
| what follows the server's prompt, up to the control token that ends the turn | yes |
| an answer whose context differs from what a server would send there | no, and counted |
| an answer of which the template writes only a part, as some drop the thoughts of earlier answers | no, and counted |
| the empty think block in Qwen3's prompt for no thoughts | no |

Bases that can think or not have two prompts. A whole conversation is learnt under one of them: that of its last answer.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from core.domain.datasets.rendering import Rendering, Span, as_dicts, render_conversation
from core.domain.datasets.tokenizers import BaseTokenizer, RenderingError
from core.domain.datasets.values import ChatExample, ChatMessage

_EMPTY_THOUGHT = re.compile(r"(<(\w+)>\s*</\2>|\[(\w+)\]\s*\[/\3\])\s*\Z")
_LEAD = re.compile(r"\s*(<\w+>|\[\w+\])?\s*")
_PROBED = "apple", "pear", "plum", "fig"
_MAX_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Answers:
    """What is learnt of a conversation, in order, and how many of its weighted answers are not learnt."""

    spans: tuple[Span, ...]
    num_left_out: int


@dataclass(frozen=True)
class _Turn:
    span: Span
    is_thinking_off: bool


class AnswerFinder:
    """Finds answers as one base's template writes them."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer

    def find(self, example: ChatExample, rendering: Rendering) -> Answers:
        """Raises RenderingError where the template cannot be trained with at all."""
        weighted = [
            index for index, message in enumerate(example.messages) if message.role == "assistant" and message.weight
        ]
        turns = [turn for index in weighted if (turn := self._find_turn(example, rendering, index)) is not None]
        spans = tuple(turn.span for turn in turns if turn.is_thinking_off == turns[-1].is_thinking_off)
        return Answers(spans, num_left_out=len(weighted) - len(spans))

    def check_template(self) -> None:
        """Raise RenderingError, in words for an operator, if no answer can be learnt together with its end."""
        if self._learns(_converse(_PROBED)):
            return
        with suppress(RenderingError):  # a base that always thinks may drop the thoughts that are given to it
            if self._learns(_converse((*_PROBED[:3], "<think>\nhm\n</think>\n\nfig"))):
                return
        raise RenderingError(
            "Its chat template writes no answer after the prompt that it gives a server (add_generation_prompt), so "
            "that no answer would be learnt as it is asked for."
        )

    def _learns(self, probe: ChatExample) -> bool:
        return bool(self.find(probe, render_conversation(self._tokenizer, probe)).spans)

    def _find_turn(self, example: ChatExample, rendering: Rendering, index: int) -> _Turn | None:
        words = rendering.words[index]
        if not words.pieces or not words.is_whole:
            return None
        text, start = rendering.text, words.pieces[0].start
        ending = self._ending.match(text, words.pieces[-1].end)
        if ending is None:
            return None
        for is_thinking_off in (False, True):
            prompt = self._render_prompt(example, index, is_thinking_off=is_thinking_off)
            if prompt is not None and text.startswith(prompt) and self._may_follow(prompt, text[:start]):
                return _Turn(Span(len(prompt), ending.end()), is_thinking_off)
        return None

    def _may_follow(self, prompt: str, lead: str) -> bool:
        """Say whether a server leaves to the model what is between a prompt and the words that `lead` leads to.

        It would for white space, for the tag before a thought, and for a header within the turn (gpt-oss names a
        channel). It would not for an empty think block, nor for the header of the turn itself.
        """
        between = lead[len(prompt) :]
        thought = _EMPTY_THOUGHT.search(lead)
        if len(lead) < len(prompt) or (thought is not None and thought.end(1) > len(prompt)):
            return False
        return bool(self._generation_prompt) or _LEAD.fullmatch(between) is not None

    def _render_prompt(self, example: ChatExample, index: int, *, is_thinking_off: bool) -> str | None:
        """Return what a server sends for a turn, or None if the template refuses to render it."""
        asked = as_dicts(ChatExample(example.messages[:index]))
        try:
            return self._tokenizer.render(
                asked, add_generation_prompt=True, enable_thinking=False if is_thinking_off else None
            )
        except RenderingError:
            return None

    @cached_property
    def _ending(self) -> re.Pattern[str]:
        """Return what ends an answer: optional white space and a control token. Found by rendering two turns."""
        probe = _converse(_PROBED)
        rendering = render_conversation(self._tokenizer, probe)
        text, words = rendering.text, rendering.words
        first_end, next_start, last_end = words[1].pieces[-1].end, words[2].pieces[0].start, words[3].pieces[-1].end
        between, rest = text[first_end:next_start], text[last_end:]
        ends = {self._find_end(between), self._find_end(rest)}
        starts = set(self._controls.findall(self._generation_prompt))
        # The first token of the next turn is not an ending, because the last turn has no such token after it.
        if len(self._controls.findall(between)) == 1:
            starts |= ends - set(self._controls.findall(rest))
        for token in ends & starts:
            raise RenderingError(
                f"Its chat template ends an answer with the first token of the next turn alone ({token!r}), so that a "
                "model would not learn when to stop. Give a template that ends each answer with a token of its own."
            )
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, sorted(ends)))})")

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        longest_first = sorted(self._tokenizer.control_tokens.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _find_end(self, rest: str) -> str:
        ending = re.match(rf"\s*({self._controls.pattern})", rest)
        if ending is None:
            raise RenderingError(
                f"Its chat template writes no control token after an answer but {rest[:_MAX_SHOWN_CHARACTERS]!r}, "
                "so that a model would not learn when to stop. Give a template that ends each answer with the "
                "end-of-sequence token, and mark that token as special in the tokenizer."
            )
        return ending[1]

    @cached_property
    def _generation_prompt(self) -> str:
        """Return what the template writes before an answer as its generation prompt, or an empty string."""
        asked = as_dicts(ChatExample(_converse(_PROBED).messages[:3]))
        prompt, plain = self._tokenizer.render(asked, add_generation_prompt=True), self._tokenizer.render(asked)
        pairs = zip(prompt, plain, strict=False)
        return prompt[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) :]


def _converse(contents: tuple[str, ...]) -> ChatExample:
    roles = ("user", "assistant") * 2
    return ChatExample(tuple(ChatMessage(role, content) for role, content in zip(roles, contents, strict=True)))
