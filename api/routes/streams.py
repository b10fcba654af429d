"""/v1/fine_tuning/jobs/{id}/stream: a job's events as they happen, as server-sent events.

Every event's SSE id is its number; a client that comes back with `Last-Event-ID` gets what came after it, all of it and
once. The stream ends with an event `end` after the job's last, or with an event `error` when the API key has died.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Header
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from api.dependencies import Caller, Database, Feed, needs
from api.errors import error_body
from api.routing import OneThreadRoute, share_of
from core.db.session import tenant_transaction
from core.domain.api_keys import Scope
from core.domain.errors import InvalidRequestError
from core.domain.ids import IdKind, parse_id
from core.services import jobs
from core.services.streams import Watch
from core.services.tenants import Identity

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], route_class=OneThreadRoute)
_RETRY_MILLISECONDS = 1000


@dataclass(frozen=True)
class TenantWatch:
    tenant_id: uuid.UUID
    watch: Watch


async def begin_watch(
    database: Database, caller: Caller, feed: Feed, job_id: str, last_event_id: Annotated[str | None, Header()] = None
) -> TenantWatch:
    """Check everything that may be refused, before the stream's answer starts."""
    feed.check_room(caller.tenant_id)
    after = _parse_number(last_event_id)
    async with share_of(caller):
        row_id = await run_in_threadpool(_find_job, database, caller, job_id)
    return TenantWatch(caller.tenant_id, Watch(row_id, caller.key_id, after))


def _find_job(database: Database, caller: Identity, job_id: str) -> uuid.UUID:
    with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
        return jobs.get_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id)).id


@router.get("/{job_id}/stream", dependencies=[needs(Scope.READ)], response_class=EventSourceResponse)
async def stream_job(
    feed: Feed, watched: Annotated[TenantWatch, Depends(begin_watch, scope="function")]
) -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent(comment="open", retry=_RETRY_MILLISECONDS)
    async for batch in feed.follow(watched.tenant_id, watched.watch):
        for event in batch.events:
            yield ServerSentEvent(id=str(event.number), event=event.type, raw_data=event.body)
        if not batch.is_key_live:
            body = error_body(401, "The API key was revoked or has expired.", code="invalid_api_key")
            yield ServerSentEvent(event="error", data=body)
        elif batch.final_status is not None:
            yield ServerSentEvent(event="end", data={"status": batch.final_status})


def _parse_number(last_event_id: str | None) -> int:
    if not last_event_id:
        return 0
    if not re.fullmatch(r"[0-9]{1,18}", last_event_id):
        raise InvalidRequestError("Last-Event-ID is not the id of an event of this stream.", param="Last-Event-ID")
    return int(last_event_id)
