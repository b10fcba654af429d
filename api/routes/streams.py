"""/v1/fine_tuning/jobs/{id}/stream: a job's events as they happen, as server-sent events.

The SSE id of an event is its number. A client that connects again with `Last-Event-ID` gets every later event exactly
once. The stream ends with an event `end` after the job's last one, or with an event `error` when the API key has died.

A batch of events is one chunk of the answer. FastAPI's own streams pass each event through two queues, which costs more
than reading it from the database.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Send
from starlette.types import Scope as ConnectionScope

from api.dependencies import Caller, Database, Feed, needs
from api.errors import error_body
from api.feeds import Batch, EventFeed
from api.parameters import JobId
from api.routers import TenantRouter
from api.routing import share_of
from core.db.session import tenant_transaction
from core.domain.api_keys import Identity, Scope
from core.domain.errors import InvalidRequestError
from core.domain.ids import IdKind, parse_id
from core.services import jobs
from core.services.streams import Watch

router = TenantRouter("/v1/fine_tuning/jobs", tag="fine-tuning")
_RETRY_MILLISECONDS = 1000
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # no proxy stores the stream or delays it
_ITEM = {
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "JSON: the event's object, the job's final status, or an error."},
        "event": {"type": "string", "description": "The type of the job's event, or `end`, or `error`."},
        "id": {"type": "string", "description": "The event's number, which `Last-Event-ID` names."},
        "retry": {"type": "integer", "minimum": 0, "description": "Milliseconds to wait before connecting again."},
    },
}

LastEventId = Annotated[
    str | None, Header(description="The `id` of the last event that was received: the stream goes on behind it.")
]


@dataclass(frozen=True)
class TenantWatch:
    tenant_id: uuid.UUID
    watch: Watch


async def begin_watch(
    database: Database, caller: Caller, feed: Feed, job_id: JobId, last_event_id: LastEventId = None
) -> TenantWatch:
    """Check everything that may be refused before the answer starts."""
    feed.check_room(caller.tenant_id)
    after = _parse_number(last_event_id)
    async with share_of(caller):
        row_id = await run_in_threadpool(_find_job, database, caller, job_id)
    return TenantWatch(caller.tenant_id, Watch(row_id, caller.key_id, after))


def _find_job(database: Database, caller: Identity, job_id: str) -> uuid.UUID:
    with tenant_transaction(database, caller.tenant_id, actor=caller.actor) as session:
        return jobs.get_job(session, caller.tenant_id, job_id=parse_id(IdKind.JOB, job_id)).id


class JobStream(StreamingResponse):
    """An answer that closes its source when the client has gone."""

    media_type = "text/event-stream"

    async def __call__(self, scope: ConnectionScope, receive: Receive, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


@router.get(
    "/{job_id}/stream",
    summary="Stream a job's events",
    dependencies=[needs(Scope.READ)],
    response_class=JobStream,
    response_description="The job's events as server-sent events, until the job has ended.",
    openapi_extra={"responses": {"200": {"content": {"text/event-stream": {"itemSchema": _ITEM}}}}},
)
async def stream_job(feed: Feed, watched: Annotated[TenantWatch, Depends(begin_watch, scope="function")]) -> JobStream:
    """Send a job's events as they happen, as server-sent events. `Last-Event-ID` continues a stream that was cut.

    The stream ends with an event `end` after the job's last one, or with an event `error` when the API key has died.
    """
    return JobStream(follow_stream(feed, watched), headers=_HEADERS)


async def follow_stream(feed: EventFeed, watched: TenantWatch) -> AsyncGenerator[bytes]:
    """Yield the stream's bytes, a batch at a time."""
    yield format_sse_event(comment="open", retry=_RETRY_MILLISECONDS)
    async with aclosing(feed.follow(watched.tenant_id, watched.watch)) as batches:
        async for batch in batches:
            yield _as_bytes(batch) or KEEPALIVE_COMMENT


def _as_bytes(batch: Batch) -> bytes:
    told = [format_sse_event(id=str(each.number), event=each.type, data_str=each.body) for each in batch.events]
    if not batch.is_key_live:
        body = error_body(401, "The API key was revoked or has expired.", code="invalid_api_key")
        told.append(format_sse_event(event="error", data_str=json.dumps(body)))
    elif batch.final_status is not None:
        told.append(format_sse_event(event="end", data_str=json.dumps({"status": batch.final_status})))
    return b"".join(told)


def _parse_number(last_event_id: str | None) -> int:
    if not last_event_id:
        return 0
    if not re.fullmatch(r"[0-9]{1,18}", last_event_id):
        raise InvalidRequestError("Last-Event-ID is not the id of an event of this stream.", param="Last-Event-ID")
    return int(last_event_id)
