"""The answers of the probes."""

from __future__ import annotations

from typing import Literal

from api.schemas.wire import Answer


class HealthObject(Answer):
    """The process works."""

    status: Literal["ok"] = "ok"
    """Always `ok`: a process that does not work answers 503, or nothing."""


class DegradedObject(Answer):
    """The process does most of its work, and lacks something for the rest."""

    status: Literal["degraded"] = "degraded"
    """Always `degraded`: the process works, and something that it needs is away."""
    code: str
    """What is missing, a stable word for programs, such as `storage_unavailable`.

    The list of error codes is in docs/errors.md and may grow.
    """
    message: str
    """What is missing, for people."""
