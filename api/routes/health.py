"""Probes. /livez asks no other service and needs no thread. /readyz asks what the API needs (see `Readiness`)."""

from __future__ import annotations

import asyncio

from fastapi import Request

from api.resources import resources_of
from api.routing import Router
from api.schemas.health import DegradedObject, HealthObject
from core.telemetry.readiness import PATIENCE_SECONDS

router = Router(tag="health")


@router.get("/livez", summary="Ask whether the process lives")
async def livez() -> HealthObject:
    """Answer as long as the event loop of the process works. No other service is asked."""
    return HealthObject()


@router.get(
    "/readyz",
    summary="Ask whether the service is ready",
    response_description="The API can serve requests. It may lack something for some of them.",
)
async def readyz(request: Request) -> HealthObject | DegradedObject:
    """Answer 200 if the API can serve requests. `degraded` means that the object store is away."""
    readiness = resources_of(request).readiness
    if asked := [asyncio.wrap_future(ended) for ended in readiness.ask()]:
        await asyncio.wait(asked, timeout=PATIENCE_SECONDS)
    verdict = readiness.judge()
    if verdict.obstacle is not None:
        raise verdict.obstacle.with_traceback(None)
    if verdict.trouble is not None:
        return DegradedObject(code=verdict.trouble.code, message=verdict.trouble.message)
    return HealthObject()
