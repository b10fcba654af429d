"""Measures how long each phase of an attempt takes. The supervisor gets the result for traces and metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from worker.messages import PhaseDone


@dataclass(frozen=True)
class Phase:
    """One phase, from its construction until `end`. It reports when it began and how long it took."""

    name: Literal["load", "train", "evaluate", "export", "upload"]
    began_at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.monotonic)

    def end(self, lease_token: int, *, artifact: str | None = None, size_bytes: int = 0) -> PhaseDone:
        return PhaseDone(
            lease_token=lease_token,
            phase=self.name,
            began_at=self.began_at,
            seconds=time.monotonic() - self.started,
            artifact=artifact,
            size_bytes=size_bytes,
        )
