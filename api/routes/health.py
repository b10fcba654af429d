"""Probes: /livez asks nothing of anybody, not even for a thread; /readyz asks the database, once a second at most."""

from __future__ import annotations

import asyncio
import time

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request

from api.dependencies import Database
from core.db.readiness import OldSchemaError, check_database
from core.db.session import DATABASE_ERRORS

router = APIRouter(tags=["health"])
_TTL_SECONDS = 1.0


class Readiness:
    """Whether the database can be used. Who asks needs no key, so all share one thread, one connection, one answer."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._asking = asyncio.Lock()
        self._threads = CapacityLimiter(1)
        self._until = 0.0
        self._error: Exception | None = None

    async def check(self) -> None:
        """Raises OldSchemaError, or one of DATABASE_ERRORS."""
        async with self._asking:
            if time.monotonic() >= self._until:
                await self._ask()
        if self._error is not None:
            raise self._error.with_traceback(None)

    async def _ask(self) -> None:
        try:
            await to_thread.run_sync(check_database, self._database, limiter=self._threads)
        except (OldSchemaError, *DATABASE_ERRORS) as error:
            self._error = error
        else:
            self._error = None
        self._until = time.monotonic() + _TTL_SECONDS


@router.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> dict[str, str]:
    readiness: Readiness = request.app.state.readiness
    await readiness.check()
    return {"status": "ok"}
