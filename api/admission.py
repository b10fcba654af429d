"""How much long work may be under way at once: work that waits for a client, the object store or a child process.

Each kind of long work has a gate. A gate has a number of places, in all and for one tenant, and one thread for each
place. A request never waits for a place, so no request is held up by another's work, and short requests keep their
own threads. A request that finds no place is refused: with 429 if its tenant has its share, with 503 if all places are
taken. Each process counts its own places.
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
    """The places of one kind of long work. It is used on the event loop only, so counting needs no lock.

    As a dependency of a route it holds a place until the answer was sent, and the route runs in the gate's threads. The
    dependency that finds the caller must come before it.
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
        """Yield what a blocking generator yields. It runs in this gate's threads."""
        with closing(chunks):
            while (chunk := await to_thread.run_sync(next, chunks, None, limiter=self.threads)) is not None:
                yield chunk


MULTIPART_BODIES = Gate("uploads", places=24, of_tenant=6)  # waits for the client
COMPLETIONS = Gate("completions", places=4, of_tenant=2)  # copies up to 8 GiB, and checks each row
DOWNLOADS = Gate("downloads", places=48, of_tenant=12)  # waits for the store, and for the reading client
PREVIEWS = Gate("previews", places=4, of_tenant=2)  # starts a child, which computes for seconds
LISTINGS = Gate("listings", places=8, of_tenant=2)  # hundreds of rows, or a scan of a long job's steps
LONG_BODIES = Gate("long_bodies", places=64, of_tenant=16)  # JSON that arrives in pieces and is kept until it is whole
