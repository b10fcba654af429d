"""How many uploads may be under way at once. An upload holds a thread for as long as its client likes to take.

Threads are left for every other request, and one tenant cannot take all the places of the others.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from core.domain.errors import RateLimitedError

# Starlette has 40 threads.
MAX_UPLOADS = 24
MAX_UPLOADS_OF_TENANT = 6
# A client that sends nothing for so long is not waited for.
CHUNK_SECONDS = 30.0


class UploadGate:
    """Counts the uploads under way. Used on the event loop only, so that counting needs no lock."""

    def __init__(self) -> None:
        self._under_way: Counter[uuid.UUID] = Counter()

    @contextmanager
    def admit(self, tenant_id: uuid.UUID) -> Iterator[None]:
        """Hold a place. Raises RateLimitedError where there is none."""
        if self._under_way[tenant_id] >= MAX_UPLOADS_OF_TENANT or self._under_way.total() >= MAX_UPLOADS:
            raise RateLimitedError("Too many uploads are under way; wait until one has ended.", code="too_many_uploads")
        self._under_way[tenant_id] += 1
        try:
            yield
        finally:
            self._under_way[tenant_id] -= 1
            if not self._under_way[tenant_id]:
                del self._under_way[tenant_id]
