"""Whether URLs can be signed now. A role may have no keys for a while, and each question for them may take seconds.

What needs no URL goes on meanwhile: jobs that are held train, and their progress is recorded.
"""

from __future__ import annotations

import time

import structlog

from core.storage import StorageUnavailableError

log = structlog.get_logger()
_KEYLESS_SECONDS = 2.0  # between two tries to get keys


class Signing:
    """Remembers that there were no keys, so that claims and grants do not ask for them in every round."""

    def __init__(self) -> None:
        self._keyless_until = 0.0

    @property
    def may_be_tried(self) -> bool:
        return time.monotonic() >= self._keyless_until

    def note_failure(self, error: StorageUnavailableError) -> None:
        log.warning("storage.unavailable", error=str(error))
        self._keyless_until = time.monotonic() + _KEYLESS_SECONDS
