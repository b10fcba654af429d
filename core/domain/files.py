"""Files as they come to be: what is known of one when its bytes are stored and its row is not there yet."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from core.domain.datasets import Problem


@dataclass(frozen=True)
class NewFile:
    """What is known of a file once its bytes are stored. `counts` are those of the check, JSON-ready."""

    id: uuid.UUID
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    object_key: str
    size_bytes: int
    sha256: str
    num_examples: int = 0
    status_details: str | None = None
    problems: tuple[Problem, ...] = ()
    counts: dict[str, Any] = field(default_factory=dict)
    lifetime: timedelta | None = None
