"""Renders conversations with the base's own chat template, and finds where each message's words are in the text.

A template is a program that may trim, reorder or rewrite its input. So it runs twice: on markers, which shows where the
words go, and on the words, which shows that they arrive unchanged. If the two results differ, the template reacts to
the content. Then the phrases that it looks for (such as `</think>`) are left between the markers, so that it takes the
same path both times. A rendering accounts for every character, or it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from core.domain.datasets.tokenizers import BaseTokenizer, RenderingError
from core.domain.datasets.values import ChatExample

# A marker is an index between two private-use characters. The white space around the words stays around the marker, so
# that a template trims both alike.
_MARKER = re.compile("\ue000([0-9]+)\ue001")
_REWRITTEN = (
    "The base's chat template rewrites the text of this conversation, so its answers cannot be told from the rest. "
    "Remove markup that the template acts on."
)


@dataclass(frozen=True)
class Span:
    """Characters from `start` up to `end`."""

    start: int
    end: int


@dataclass(frozen=True)
class Words:
    """Where one message's words are: pieces in order. The template may have left some out.

    The text between two pieces may be the template's own. A message of white space has no pieces.
    """

    pieces: tuple[Span, ...]
    is_whole: bool


@dataclass(frozen=True)
class Rendering:
    """A conversation's text. `words[i]` is where the words of message i are."""

    text: str
    words: tuple[Words, ...]


def render_conversation(tokenizer: BaseTokenizer, example: ChatExample) -> Rendering:
    """Render a conversation with the tokenizer's chat template. Raises RenderingError if it cannot be followed."""
    text = tokenizer.render(as_dicts(example))
    for phrases in ((), tokenizer.phrases):
        found = _follow(tokenizer, example, phrases)
        if found.text == text:
            _refuse_losses(example, found)
            return found
    raise RenderingError(_REWRITTEN)


def as_dicts(example: ChatExample, contents: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Return messages as templates read them, with other contents if some are given."""
    said = contents if contents is not None else [message.content for message in example.messages]
    return [{"role": message.role, "content": content} for message, content in zip(example.messages, said, strict=True)]


@dataclass(frozen=True)
class _Piece:
    """Words without the white space around them, and the message that they belong to."""

    message: int
    text: str


def _cut(content: str, phrases: Sequence[str]) -> list[str]:
    """Return a content cut at the phrases: words at even indexes, phrases at odd ones."""
    return re.split("(" + "|".join(map(re.escape, phrases)) + ")", content) if phrases else [content]


def _follow(tokenizer: BaseTokenizer, example: ChatExample, phrases: Sequence[str]) -> Rendering:
    """Render markers instead of the words, and put the words back where the markers are."""
    pieces: list[_Piece] = []
    marked = []
    for index, message in enumerate(example.messages):
        content = ""
        for place, part in enumerate(_cut(message.content, phrases)):
            is_phrase, words = place % 2, part.strip()
            if is_phrase or not words:
                content += part
                continue
            before, _, after = part.partition(words)
            content += f"{before}\ue000{len(pieces)}\ue001{after}"
            pieces.append(_Piece(index, words))
        marked.append(content)
    return _fill(tokenizer.render(as_dicts(example, marked)), pieces, num_messages=len(marked))


def _fill(template: str, pieces: Sequence[_Piece], *, num_messages: int) -> Rendering:
    text, cursor = "", 0
    spans: dict[int, Span] = {}
    for marker in _MARKER.finditer(template):
        index = int(marker[1])
        if index in spans:
            raise RenderingError(f"The base's chat template writes message {pieces[index].message + 1} twice.")
        text += template[cursor : marker.start()]
        spans[index] = Span(len(text), len(text) + len(pieces[index].text))
        text += pieces[index].text
        cursor = marker.end()
    written: list[list[Span | None]] = [[] for _ in range(num_messages)]
    for index, piece in enumerate(pieces):
        written[piece.message].append(spans.get(index))
    return Rendering(text + template[cursor:], tuple(map(_gather, written)))


def _gather(spans: Sequence[Span | None]) -> Words:
    found = [span for span in spans if span is not None]
    is_in_order = all(one.end <= other.start for one, other in pairwise(found))
    return Words(tuple(found), is_whole=len(found) == len(spans) and is_in_order)


def _refuse_losses(example: ChatExample, rendering: Rendering) -> None:
    """Refuse a message whose words are missing from the text. An answer before the last may lose a part."""
    last = len(example.messages) - 1
    for index, (message, words) in enumerate(zip(example.messages, rendering.words, strict=True)):
        if not words.is_whole and not (words.pieces and message.role == "assistant" and index < last):
            part = "a part of " if words.pieces else ""
            raise RenderingError(f"The base's chat template leaves out {part}message {index + 1} of this conversation.")
