"""How much long work may be under way at once: what waits for a client, for the object store or for a child process.

Each kind of long work has a gate: places that are counted, of one tenant and in all, and threads of its own, one a
place. A place is never waited for, so no request is held up by work that is not its own, and the threads of short
requests are left to them. Whoever finds none is told to come again: 429 where its organization has its share, 503 where
all places are taken. Places are a process's own.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import closing, contextmanager

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from core.domain.errors import RateLimitedError, UnavailableError


class Gate:
    """The places of one kind of long work. Used on the event loop only, so that counting needs no lock.

    As a route's dependency, behind the one that knows the caller, it holds a place until the answer has been sent, and
    the route runs in its threads.
    """

    def __init__(self, name: str, *, places: int, of_tenant: int) -> None:
        self.name, self.places, self.of_tenant = name, places, of_tenant
        self.threads = CapacityLimiter(places)
        self._taken: Counter[uuid.UUID] = Counter()

    async def __call__(self, request: Request) -> AsyncIterator[None]:
        with self.admit(request.state.identity.tenant_id):
            yield

    @contextmanager
    def admit(self, tenant_id: uuid.UUID) -> Iterator[None]:
        """Hold a place. Raises RateLimitedError or UnavailableError where there is none."""
        if self._taken[tenant_id] >= self.of_tenant:
            message = f"Your organization has {self.of_tenant} {self.name} under way; wait until one has ended."
            raise RateLimitedError(message, code=f"too_many_{self.name}")
        if self._taken.total() >= self.places:
            raise UnavailableError(f"Too many {self.name} are under way; try again.", code=f"{self.name}_busy")
        self._taken[tenant_id] += 1
        try:
            yield
        finally:
            self._taken[tenant_id] -= 1
            if not self._taken[tenant_id]:
                del self._taken[tenant_id]

    async def iterate(self, chunks: Generator[bytes]) -> AsyncIterator[bytes]:
        """Yield what a generator yields that waits, in this gate's threads."""
        with closing(chunks):
            while (chunk := await to_thread.run_sync(next, chunks, None, limiter=self.threads)) is not None:
                yield chunk


MULTIPART_BODIES = Gate("uploads", places=24, of_tenant=6)  # a client takes as long as it likes
COMPLETIONS = Gate("completions", places=4, of_tenant=2)  # copies up to 8 GiB, and checks each row
DOWNLOADS = Gate("downloads", places=48, of_tenant=12)  # waits for the store, and for who reads
PREVIEWS = Gate("previews", places=4, of_tenant=2)  # a child each, which computes for seconds
LISTINGS = Gate("listings", places=8, of_tenant=2)  # hundreds of rows, or a scan of a long job's steps
LONG_BODIES = Gate("long_bodies", places=64, of_tenant=16)  # JSON that comes in pieces, kept until it is whole
