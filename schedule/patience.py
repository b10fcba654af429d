"""Tells an object that cannot be deleted from a store that is away: several failures in a row mean the store."""

from __future__ import annotations

from core.storage import StorageError

_MAX_FAILURES_IN_A_ROW = 5


class Patience:
    """Counts consecutive failures during one run of a duty."""

    def __init__(self) -> None:
        self._num_failures = 0

    def heed(self, error: Exception | None) -> None:
        """Note the result of one row. Raises the last StorageError if too many came in a row."""
        if not isinstance(error, StorageError):
            self._num_failures = 0
            return
        self._num_failures += 1
        if self._num_failures >= _MAX_FAILURES_IN_A_ROW:
            raise error
