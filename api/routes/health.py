"""Probes: /livez asks nothing of anybody, not even for a thread; /readyz asks the database."""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import Database
from core.db.session import ping

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz")
def readyz(database: Database) -> dict[str, str]:
    ping(database)
    return {"status": "ok"}
