"""Tells an object that cannot be deleted from a store that is away: so many failures in a row are the store's."""

from __future__ import annotations

from core.storage import StorageError

_MAX_FAILURES_IN_A_ROW = 5


class Patience:
    """Counts what fails in a row during one run of a duty."""

    def __init__(self) -> None:
        self._num_failures = 0

    def heed(self, error: Exception | None) -> None:
        """Note how it went with one row. Raises the StorageError of the last of too many in a row."""
        if not isinstance(error, StorageError):
            self._num_failures = 0
            return
        self._num_failures += 1
        if self._num_failures >= _MAX_FAILURES_IN_A_ROW:
            raise error
