"""A base's tokenizer and chat template without the base, as the trainer, previews and the offline check read it.

It needs only the `tokenizers` package, which is the library that transformers itself calls. A vocabulary loads in a
sixth of a second, without transformers and torch. The worker that holds a base writes the bundle from the tokenizer
that it has loaded, so no other process has to guess how transformers would load it.
"""

from __future__ import annotations

import copy
import datetime as dt
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from tokenizers import Tokenizer

from core.domain.datasets.templates import compile_template, find_texts
from core.domain.values import Frozen

_PHRASE = re.compile(r"\w.*[^\w\s]|[^\w\s].*\w", re.DOTALL)


class RenderingError(Exception):
    """The base's chat template or tokenizer cannot write a conversation faithfully. The message is a sentence."""


class TokenizerBundle(Frozen):
    """`backend` is the tokenizers package's own JSON; `special_tokens` are the template's variables, "eos_token" ..."""

    backend: str
    chat_template: str
    special_tokens: dict[str, str]


def tokenizer_path(cache_dir: Path, base_model_id: str) -> Path:
    """Return where a worker on this machine stores the bundle of a base."""
    return cache_dir / "tokenizers" / f"{quote(base_model_id, safe='')}.json"


@dataclass(frozen=True)
class Encoding:
    """Token ids, and where in the text each token starts and ends."""

    token_ids: list[int]
    offsets: list[tuple[int, int]]


class BaseTokenizer:
    """Renders and encodes as the base's own tokenizer does.

    `control_tokens`, by id, are the tokens marked as special, and the end-of-sequence token.
    """

    def __init__(self, bundle: TokenizerBundle) -> None:
        self._backend = Tokenizer.from_str(bundle.backend)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._variables = dict(bundle.special_tokens)
        self._source = bundle.chat_template
        self._now: dt.datetime | None = None
        # What the template has written of the clock, by the format that it asked for.
        self.told_times: dict[str, str] = {}
        added = self._backend.get_added_tokens_decoder()
        self.control_tokens = {token_id: token.content for token_id, token in added.items() if token.special}
        eos_token = bundle.special_tokens.get("eos_token")
        if eos_token and (eos_id := self._backend.token_to_id(eos_token)) is not None:
            self.control_tokens[eos_id] = eos_token

    def render(
        self,
        messages: Sequence[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
    ) -> str:
        """Render messages with the chat template. Raises RenderingError if it refuses them or is broken.

        `enable_thinking` is passed on if it is given: templates of bases that can think or not use this name.
        """
        switches: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        if self._now is not None:
            switches["strftime_now"] = self._tell_time
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(given, **self._variables, **switches)
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError, ZeroDivisionError, LookupError) as error:
            raise RenderingError(f"The base's chat template refuses this conversation: {error}") from error

    def at(self, now: dt.datetime) -> BaseTokenizer:
        """Return the same tokenizer with a fixed clock, for templates that write the date."""
        standing = copy.copy(self)
        standing._now = now  # noqa: SLF001 (of its own class)
        standing.told_times = {}
        return standing

    @cached_property
    def phrases(self) -> tuple[str, ...]:
        """The texts that the chat template may look for in a message, longest first. None can form a control token."""
        try:
            texts = find_texts(self._source)
        except jinja2.TemplateError as error:
            raise RenderingError(f"The base's chat template is broken: {error}") from error
        return tuple(sorted(filter(self._is_phrase, texts), key=lambda text: (-len(text), text)))

    def _tell_time(self, form: str) -> str:
        assert self._now is not None
        self.told_times[form] = self._now.strftime(form)
        return self.told_times[form]

    @cached_property
    def vocab_size(self) -> int:
        """One more than the greatest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _template(self) -> jinja2.Template:
        return compile_template(self._source)

    def _is_phrase(self, text: str) -> bool:
        """Say whether a text is markup rather than a word, and neither contains a control token nor may begin one."""
        ends = [text[start:] for start in range(len(text))]
        return bool(_PHRASE.search(text)) and not any(
            token in text or any(token.startswith(end) for end in ends) for token in self.control_tokens.values()
        )

    def encode(self, pieces: Sequence[str]) -> list[Encoding]:
        encodings = self._backend.encode_batch(list(pieces), add_special_tokens=False)
        return [Encoding(encoding.ids, encoding.offsets) for encoding in encodings]

    def show_token(self, token_id: int) -> str:
        """Return a token as text. A part of a character is shown as U+FFFD."""
        return str(self._backend.decode([token_id], skip_special_tokens=False))
