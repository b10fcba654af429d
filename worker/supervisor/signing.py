"""Signs URLs with keys that a role may not have for a while. Each request for the keys may take seconds.

Work that needs no URL continues meanwhile: held jobs train, and their progress is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from core.storage import ObjectStore, StorageUnavailableError

log = structlog.get_logger()
_KEYLESS_SECONDS = 2.0  # between two tries to get keys

T = TypeVar("T")


class Signing:
    """Lets callers sign URLs while there are keys, and remembers when there were none."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._keyless_until = 0.0

    def attempt(self, sign: Callable[[ObjectStore], T]) -> T | None:
        """Return the result of `sign` with the store, or None while there are no keys. What it did by then stays.

        The keys are fetched before it begins, so that no transaction inside `sign` waits for them.
        """
        if time.monotonic() < self._keyless_until:
            return None
        try:
            self._store.renew_keys()
            return sign(self._store)
        except StorageUnavailableError as error:
            log.warning("storage.unavailable", error=str(error))
            self._keyless_until = time.monotonic() + _KEYLESS_SECONDS
            return None
