"""The feed of job events: one poller in each process reads the events for all open streams.

A waiting stream holds neither a database connection nor a thread. A notification from PostgreSQL names the job that has
new events. Every `SWEEP_SECONDS` the poller reads for all streams, to find events without a notification and keys that
have died. A few threads do the reading: the streams of one tenant together, in one transaction of that tenant.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import structlog
from sqlalchemy import Engine

from api.metrics import OPEN_STREAMS
from api.schemas.openai.events import EventObject
from core.db.notifications import Listener
from core.db.session import DATABASE_ERRORS, tenant_transaction
from core.domain.errors import RateLimitedError
from core.services.events import EVENT_CHANNEL
from core.services.streams import Watch, WatchState, read_watches
from core.telemetry.liveness import PROCESS, end_process

log = structlog.get_logger()

SWEEP_SECONDS = 2.0
MAX_STREAMS_PER_TENANT = 500
IDLE_SECONDS = 15.0  # a quiet stream sends something, so that no proxy takes it for a dead one
_GATHER_SECONDS = 0.02  # events of one step of a fused batch arrive within this time and are read together
_RETRY_SECONDS = 0.5
_NUM_READERS = 4


@dataclass(frozen=True)
class StreamedEvent:
    """One event, ready to be sent: its number, its type and its object as JSON."""

    number: int
    type: str
    body: str


@dataclass(frozen=True)
class Batch:
    """What a stream sends next. A batch with `final_status` or a dead key is the last one."""

    events: tuple[StreamedEvent, ...] = ()
    final_status: str | None = None
    is_key_live: bool = True
    has_more: bool = False

    @property
    def is_last(self) -> bool:
        return self.final_status is not None or not self.is_key_live


_NOTHING = Batch()
_CLOSED = None


@dataclass(eq=False)
class _Stream:
    """An open stream. Events are read for it only while it waits, so a slow client holds at most one batch."""

    tenant_id: uuid.UUID
    watch: Watch
    is_waiting: bool = False
    has_news: bool = True
    is_behind: bool = False  # the last batch was not all
    batches: asyncio.Queue[Batch | None] = field(default_factory=asyncio.Queue)


class EventFeed:
    """Follows jobs for every open stream of this process. It is used on the event loop that runs it."""

    def __init__(self, engine: Engine, database_url: str) -> None:
        self._engine, self._database_url = engine, database_url
        self._streams: set[_Stream] = set()
        self._num_open: Counter[uuid.UUID] = Counter()
        self._woken = asyncio.Event()
        self._is_closed = False
        self._swept_at = 0.0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Poll for as long as the context is open."""
        loop = asyncio.get_running_loop()
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="feed")

        def note(job_id: str | None = None) -> None:
            loop.call_soon_threadsafe(self._note, job_id)

        listener = Listener(self._database_url, EVENT_CHANNEL, on_payload=note, on_connect=note)
        listening = PROCESS.start_thread(listener.run, name=f"listen:{EVENT_CHANNEL}")
        poller = asyncio.create_task(self._poll())
        poller.add_done_callback(_end_process_with)
        try:
            yield
        finally:
            self.close()
            PROCESS.release(listening)
            listener.request_stop()
            poller.cancel()
            await asyncio.gather(poller, return_exceptions=True)
            await loop.run_in_executor(None, listening.join)
            self._readers.shutdown()

    def close(self) -> None:
        """End every stream without an event. Its client connects again with the number of its last event."""
        self._is_closed = True
        _close(self._streams)

    def check_room(self, tenant_id: uuid.UUID) -> None:
        """Raises RateLimitedError when the tenant has too many streams open in this process."""
        if self._num_open[tenant_id] >= MAX_STREAMS_PER_TENANT:
            raise RateLimitedError(
                f"There are {MAX_STREAMS_PER_TENANT} open streams already; close some.", code="too_many_streams"
            )

    async def follow(self, tenant_id: uuid.UUID, watch: Watch) -> AsyncGenerator[Batch]:
        """Yield what happens to a job after the watch's last event, until the job or the key ends.

        An empty batch means that nothing has happened for a while.
        """
        stream = _Stream(tenant_id, watch)
        self._streams.add(stream)
        self._num_open[tenant_id] += 1
        OPEN_STREAMS.inc()
        try:
            while not self._is_closed:
                stream.is_waiting = True
                self._woken.set()
                try:
                    async with asyncio.timeout(IDLE_SECONDS):
                        batch = await stream.batches.get()
                except TimeoutError:
                    batch = _NOTHING
                if batch is _CLOSED:
                    return
                yield batch
                if batch.is_last:
                    return
        finally:
            self._streams.discard(stream)
            self._num_open[tenant_id] -= 1
            OPEN_STREAMS.dec()

    def _note(self, job_id: str | None) -> None:
        """Mark the streams of a job, or of all jobs, as having new events."""
        for stream in self._streams:
            if job_id is None or str(stream.watch.job_id) == job_id:
                stream.has_news = True
        self._woken.set()

    async def _poll(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_SECONDS):
                    await self._woken.wait()
            if not any(stream.is_waiting and stream.is_behind for stream in self._streams):
                await asyncio.sleep(_GATHER_SECONDS)
            self._woken.clear()
            due = self._take_due()
            if due and not await self._read(due):
                await asyncio.sleep(_RETRY_SECONDS)
                self._note(None)

    def _take_due(self) -> list[_Stream]:
        is_sweep = time.monotonic() - self._swept_at >= SWEEP_SECONDS
        if is_sweep:
            self._swept_at = time.monotonic()
        return [stream for stream in self._streams if stream.is_waiting and (is_sweep or stream.has_news)]

    async def _read(self, due: list[_Stream]) -> bool:
        """Read for these streams, a tenant at a time. Return False if the database is away.

        If the rows of one tenant cannot be read, that tenant's streams end and no others.
        """
        of_tenants: dict[uuid.UUID, list[_Stream]] = defaultdict(list)
        for stream in due:
            stream.has_news = False
            of_tenants[stream.tenant_id].append(stream)
        loop = asyncio.get_running_loop()
        reads = [
            loop.run_in_executor(self._readers, self._read_tenant, tenant_id, [stream.watch for stream in streams])
            for tenant_id, streams in of_tenants.items()
        ]
        answers = await asyncio.gather(*reads, return_exceptions=True)
        for (tenant_id, streams), batches in zip(of_tenants.items(), answers, strict=True):
            if isinstance(batches, BaseException):
                log.error("feed.failed", tenant_id=str(tenant_id), exc_info=batches)
                _close(streams)
            else:
                _deliver(streams, batches or ())
        return None not in answers

    def _read_tenant(self, tenant_id: uuid.UUID, watches: list[Watch]) -> list[Batch] | None:
        try:
            with tenant_transaction(self._engine, tenant_id, actor="event feed") as session:
                states = read_watches(session, tenant_id, watches=watches)
        except DATABASE_ERRORS as error:
            log.warning("database.unavailable", error=type(error).__name__)
            return None
        return [_as_batch(state) for state in states]


def _end_process_with(poller: asyncio.Task[None]) -> None:
    """End the process: without the poller every stream would stay open and silent for ever."""
    if not poller.cancelled():
        end_process("feed", poller.exception())


def _close(streams: Iterable[_Stream]) -> None:
    for stream in streams:
        stream.is_waiting = False
        stream.batches.put_nowait(_CLOSED)


def _deliver(streams: list[_Stream], batches: Iterable[Batch]) -> None:
    for stream, batch in zip(streams, batches, strict=False):
        if batch == _NOTHING:
            continue
        if batch.events:
            stream.watch = replace(stream.watch, after=batch.events[-1].number)
        stream.has_news |= batch.has_more  # a notification that came during the read still counts
        stream.is_behind = batch.has_more
        stream.is_waiting = False
        stream.batches.put_nowait(batch)


def _as_batch(state: WatchState) -> Batch:
    events = tuple(
        StreamedEvent(event.number, event.type, EventObject.of(event).model_dump_json()) for event in state.events
    )
    return Batch(events, state.final_status, state.is_key_live, state.has_more)
