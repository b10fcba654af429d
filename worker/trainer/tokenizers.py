"""Makes the tokenizer bundle, which all processes read, from the tokenizer that transformers has loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.domain.datasets.tokenizers import TokenizerBundle
from core.scratch import scratch_directory


def describe_tokenizer(tokenizer: Any) -> TokenizerBundle:
    """Return the bundle of a fast tokenizer of transformers, as it is after loading."""
    return TokenizerBundle(
        backend=tokenizer.backend_tokenizer.to_str(),
        chat_template=tokenizer.chat_template,
        special_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    )


def write_bundle(bundle: TokenizerBundle, path: Path) -> None:
    """Write a bundle completely or not at all. Another worker on the same cache may do the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory("base", path.parent) as scratch:
        unfinished = scratch / path.name
        unfinished.write_text(bundle.model_dump_json(), encoding="utf-8")
        unfinished.replace(path)
