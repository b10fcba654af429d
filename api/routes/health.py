"""Probes: /livez asks nothing of anybody, not even for a thread; /readyz asks what the API needs (see `Readiness`)."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from core.telemetry.readiness import PATIENCE_SECONDS, Readiness

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> dict[str, str]:
    readiness: Readiness = request.app.state.readiness
    if asked := [asyncio.wrap_future(ended) for ended in readiness.ask()]:
        await asyncio.wait(asked, timeout=PATIENCE_SECONDS)
    verdict = readiness.judge()
    if verdict.obstacle is not None:
        raise verdict.obstacle.with_traceback(None)
    if verdict.trouble is not None:
        return {"status": "degraded", "code": verdict.trouble.code, "message": verdict.trouble.message}
    return {"status": "ok"}
