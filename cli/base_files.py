"""Reads type, linears, length, dtype and licence of a base from its own files, so that operators need not type them.

Only small files are read, without torch: `config.json` and `README.md`, or the head of a GGUF file.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import yaml

from core.domain.bases import LICENSE_PATTERN, LINEARS_BY_MODEL_TYPE, BaseModelSource

_GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_MAX_STRING_BYTES = 2**24


class BaseFilesError(ValueError):
    """The files lack something that is needed, or contain something that cannot be right."""


@dataclass(frozen=True)
class BaseDescription:
    model_type: str
    max_positions: int
    dtype: Literal["float32", "bfloat16"]

    @property
    def linears(self) -> tuple[str, ...]:
        """Raises BaseFilesError for a type that cannot be fused."""
        if self.model_type not in LINEARS_BY_MODEL_TYPE:
            known = ", ".join(sorted(LINEARS_BY_MODEL_TYPE))
            raise BaseFilesError(f"Models of type {self.model_type!r} cannot be fused; supported: {known}.")
        return LINEARS_BY_MODEL_TYPE[self.model_type]


def describe_base(source: BaseModelSource) -> BaseDescription:
    """Return what the files say. Raises BaseFilesError or OSError."""
    if source.kind == "gguf":
        return _describe_gguf(Path(source.location))
    directory = Path(source.location) if source.kind == "path" else _hub_snapshot(source)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        dtype = config.get("dtype") or config.get("torch_dtype")
        return BaseDescription(
            model_type=str(config["model_type"]),
            max_positions=int(config["max_position_embeddings"]),
            dtype="float32" if dtype == "float32" else "bfloat16",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BaseFilesError(f"{directory}/config.json is none of a language model: {error!r}.") from error


def find_license(source: BaseModelSource) -> str | None:
    """Return the licence that the files name, or None if the files are missing or name none."""
    try:
        if source.kind == "gguf":
            found = _gguf_license(Path(source.location))
        else:
            directory = Path(source.location) if source.kind == "path" else _hub_snapshot(source)
            found = _card_license((directory / "README.md").read_text(encoding="utf-8"))
    except (BaseFilesError, OSError, UnicodeDecodeError, KeyError, struct.error, yaml.YAMLError):
        return None
    return found if isinstance(found, str) and re.fullmatch(LICENSE_PATTERN, found) else None


def _card_license(card: str) -> Any:
    """Return `license` from a model card's front matter, which is YAML between two lines of dashes."""
    front_matter = re.match(r"---\r?\n(.*?)\r?\n---\s*?(\n|$)", card, re.DOTALL)
    found = yaml.safe_load(front_matter[1]) if front_matter else None
    return found.get("license") if isinstance(found, dict) else None


def _gguf_license(path: Path) -> Any:
    """Return `general.license`. The general keys come before the tokenizer's long lists."""
    with path.open("rb") as content:
        for key, value in _gguf_pairs(content):
            if key == "general.license":
                return value
            if key.startswith("tokenizer."):
                break
    return None


def _hub_snapshot(source: BaseModelSource) -> Path:
    """Return where the hub's client stores a revision that it has downloaded."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return cache / f"models--{source.location.replace('/', '--')}" / "snapshots" / source.revision


def _describe_gguf(path: Path) -> BaseDescription:
    """Read a GGUF file's metadata up to the keys that are needed, which come before its long lists."""
    try:
        with path.open("rb") as content:
            architecture = ""
            for key, value in _gguf_pairs(content):
                if key == "general.architecture":
                    architecture = str(value)
                if architecture and key == f"{architecture}.context_length":
                    return BaseDescription(architecture, int(value), "bfloat16")
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise BaseFilesError(f"{path} is damaged, or no GGUF file.") from error
    raise BaseFilesError(f"{path} does not say what architecture it is of, or how long its context is.")


def _gguf_pairs(content: BinaryIO) -> Iterator[tuple[str, Any]]:
    magic, _version, _num_tensors, num_pairs = _unpack(content, "4sIQQ")
    if magic != b"GGUF":
        raise BaseFilesError("It is no GGUF file.")
    for _ in range(num_pairs):
        key = _gguf_string(content)
        (kind,) = _unpack(content, "I")
        yield key, _gguf_value(content, kind)


def _gguf_value(content: BinaryIO, kind: int) -> Any:
    if kind == _GGUF_STRING:
        return _gguf_string(content)
    if kind == _GGUF_ARRAY:
        item_kind, length = _unpack(content, "IQ")
        for _ in range(length):
            _gguf_value(content, item_kind)
        return None
    (number,) = _unpack(content, _GGUF_NUMBERS[kind])
    return number


def _gguf_string(content: BinaryIO) -> str:
    (length,) = _unpack(content, "Q")
    if length > _MAX_STRING_BYTES:
        raise BaseFilesError("It is damaged: a string of its metadata has no end.")
    return content.read(length).decode("utf-8")


def _unpack(content: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack("<" + form, content.read(struct.calcsize("<" + form)))
