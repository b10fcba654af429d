"""How long each phase of an attempt takes, as the supervisor is told: it keeps the traces and the figures."""

from __future__ import annotations

import time
from typing import Literal

from worker.messages import PhaseDone


class Phase:
    """One phase, from when it is made until it is ended. It says when it began, and how long it took."""

    def __init__(self, name: Literal["load", "train", "evaluate", "export", "upload"]) -> None:
        self._name = name
        self._began_at = time.time()
        self._started = time.monotonic()

    def end(self, lease_token: int, *, artifact: str | None = None, size_bytes: int = 0) -> PhaseDone:
        return PhaseDone(
            lease_token=lease_token,
            phase=self._name,
            began_at=self._began_at,
            seconds=time.monotonic() - self._started,
            artifact=artifact,
            size_bytes=size_bytes,
        )
