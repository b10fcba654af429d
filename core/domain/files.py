"""Files before they have a row: what is known once their bytes are stored."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from core.domain.datasets import Problem


@dataclass(frozen=True)
class NewFile:
    """What is known of a file once its bytes are stored. `counts` is the check's report, JSON-ready."""

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
