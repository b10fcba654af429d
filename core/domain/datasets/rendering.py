"""Conversations as text, as the base's own chat template writes them, with where each message's words stand.

A template is a program that may trim, reorder or rewrite what it is given. So it is run twice: on markers, which shows
where the words go, and on the words, which shows that they went there unchanged. A rendering either accounts for every
character or is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from core.domain.datasets.tokenizers import BaseTokenizer, RenderingError
from core.domain.datasets.values import ChatExample

# A marker is an index between two private characters, in white space that no template writes of itself: what comes back
# without it is trimmed.
_PADDING = "\u2003"
_MARKER = re.compile(f"({_PADDING}?)\ue000([0-9]+)\ue001({_PADDING}?)")


@dataclass(frozen=True)
class Span:
    """Characters from `start` up to `end`."""

    start: int
    end: int


@dataclass(frozen=True)
class Rendering:
    """A conversation's text; `contents[i]` is where the words of message i stand."""

    text: str
    contents: tuple[Span, ...]


def render_conversation(tokenizer: BaseTokenizer, example: ChatExample) -> Rendering:
    """Write a conversation as the tokenizer's chat template does. Raises RenderingError where it cannot be followed."""
    contents = [message.content for message in example.messages]
    markers = [f"{_PADDING}\ue000{index}\ue001{_PADDING}" for index in range(len(contents))]
    rendering = _fill(_apply_template(tokenizer, example, markers), contents)
    if rendering.text != _apply_template(tokenizer, example, contents):
        raise RenderingError(
            "The base's chat template rewrites the text of this conversation, so its answers cannot be told from the "
            "rest. Remove markup that the template acts on, such as thinking tags."
        )
    return rendering


def _apply_template(tokenizer: BaseTokenizer, example: ChatExample, contents: Sequence[str]) -> str:
    messages = [
        {"role": message.role, "content": content} for message, content in zip(example.messages, contents, strict=True)
    ]
    return tokenizer.render(messages)


def _fill(template: str, contents: Sequence[str]) -> Rendering:
    """Put the contents where their markers stand, trimmed as the markers were."""
    text, cursor = "", 0
    spans: dict[int, Span] = {}
    for marker in _MARKER.finditer(template):
        index = int(marker[2])
        if index in spans:
            raise RenderingError(f"The base's chat template writes message {index + 1} of this conversation twice.")
        text += template[cursor : marker.start()]
        words = contents[index] if marker[1] else contents[index].lstrip()
        words = words if marker[3] else words.rstrip()
        spans[index] = Span(len(text), len(text) + len(words))
        text += words
        cursor = marker.end()
    for index in range(len(contents)):
        if index not in spans:
            raise RenderingError(f"The base's chat template leaves out message {index + 1} of this conversation.")
    return Rendering(text + template[cursor:], tuple(spans[index] for index in range(len(contents))))
