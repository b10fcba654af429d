"""A TCP proxy that breaks: it is put in front of a real server and treats its bytes as bad networks do.

The present fault is a value. It may change at any moment, and then also holds for open connections. One thread runs all
proxies. Clients get the proxy's port; tests that look behind it use the server's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import ssl as tls
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

from local.servers import LocalServers, ServerAddresses
from tests.waiting import PATIENCE_SECONDS, wait_until

T = TypeVar("T")
_CHUNK_BYTES = 64 * 1024
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/xml\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s"
)
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")


@dataclass(frozen=True)
class Fault:
    """What happens to bytes. This one: nothing."""


@dataclass(frozen=True)
class Cut(Fault):
    """Connections end at once, and new ones as soon as they are made."""


@dataclass(frozen=True)
class Hang(Fault):
    """Connections stay, and nothing comes through either way until the fault is over."""


@dataclass(frozen=True)
class Delay(Fault):
    """Every chunk comes late."""

    seconds: float


@dataclass(frozen=True)
class FlipByte(Fault):
    """One byte in the body of every answer to an HTTP GET is another."""


@dataclass(frozen=True)
class Answer503(Fault):
    """Every HTTP request is told to slow down, and its connection closed; the server never hears of it."""


@dataclass(frozen=True)
class CutAfter(Fault):
    """The server gets a word and what comes with it; the client never gets the answer, and its connection ends.

    With `once_sent`, only connections count on which the client has sent that before.
    """

    word: bytes
    once_sent: bytes = b""


@dataclass(eq=False)
class _Link:
    """One client's connection and its own to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    is_get: bool = False
    is_body_flipped: bool = False
    is_marked: bool = False  # what `once_sent` names has passed
    is_deaf: bool = False  # the word has passed: no answer may
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def close(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()


class FaultProxy:
    """Listens on a free loopback port from `__enter__` to `__exit__`. `num_hits` counts what the faults did.

    With `ssl`, clients speak TLS to it; the server behind it never does.
    """

    def __init__(self, upstream_port: int, *, ssl: tls.SSLContext | None = None) -> None:
        self._upstream_port, self._ssl = upstream_port, ssl
        self._fault: Fault = Fault()
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"faults:{upstream_port}", daemon=True)
        self.num_hits = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._passing = asyncio.Event()
        self._passing.set()
        self._listener = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._ssl))
        self.port: int = self._listener.sockets[0].getsockname()[1]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def inject(self, fault: Fault) -> None:
        """Put a fault in force, for open connections too; `Fault()` ends it."""
        self._call(self._apply(fault))

    @contextmanager
    def during(self, fault: Fault) -> Iterator[None]:
        self.inject(fault)
        try:
            yield
        finally:
            self.inject(Fault())

    def lead_to(self, upstream_port: int) -> None:
        """Be another server's address from now on, as in a failover. Open connections end, as with the old one."""
        self._upstream_port = upstream_port
        self.inject(Cut())
        self.inject(Fault())

    @property
    def num_connections(self) -> int:
        return len(self._links)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_SECONDS)

    async def _apply(self, fault: Fault) -> None:
        self._fault = fault
        if isinstance(fault, Hang):
            self._passing.clear()
        else:
            self._passing.set()
        if isinstance(fault, Cut):
            self._cut_all()

    def _cut_all(self) -> None:
        self.num_hits += len(self._links)
        for link in tuple(self._links):
            link.close()

    async def _close(self) -> None:
        self._listener.close()
        tasks = [task for link in self._links for task in link.tasks]
        for link in tuple(self._links):
            link.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        self._links.add(link)
        task = asyncio.current_task()
        assert task is not None
        link.tasks.append(task)
        try:
            if isinstance(self._fault, Cut):
                self.num_hits += 1
                return
            server_reader, link.server = await asyncio.open_connection("127.0.0.1", self._upstream_port)
            answers = asyncio.create_task(self._pass_answers(link, server_reader))
            link.tasks.append(answers)
            await self._pass_requests(link, reader)
            await answers
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            link.close()
            self._links.discard(link)

    async def _pass_requests(self, link: _Link, reader: asyncio.StreamReader) -> None:
        assert link.server is not None
        while chunk := await reader.read(_CHUNK_BYTES):
            await self._suffer()
            is_request = chunk.startswith(_METHODS)
            if is_request:
                link.is_get, link.is_body_flipped = chunk.startswith(b"GET "), False
            if isinstance(self._fault, Answer503) and is_request:
                self.num_hits += 1
                await self._refuse(link, reader)
                return
            if isinstance(self._fault, CutAfter):
                self._listen(link, chunk, self._fault)
            link.server.write(chunk)
            await link.server.drain()
        with contextlib.suppress(OSError):
            link.server.write_eof()

    def _listen(self, link: _Link, chunk: bytes, fault: CutAfter) -> None:
        link.is_marked = link.is_marked or fault.once_sent in chunk
        if link.is_marked and fault.word in chunk:
            self.num_hits += 1
            link.is_deaf = True

    async def _pass_answers(self, link: _Link, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES):
                await self._suffer()
                if link.is_deaf:  # the server has answered, so it has done what it was asked
                    link.close()
                    return
                link.client.write(self._flip(link, chunk) if isinstance(self._fault, FlipByte) else chunk)
                await link.client.drain()
        link.close()

    async def _suffer(self) -> None:
        if isinstance(self._fault, Delay):
            self.num_hits += 1
            await asyncio.sleep(self._fault.seconds)
        if not self._passing.is_set():
            self.num_hits += 1
            await self._passing.wait()

    def _flip(self, link: _Link, chunk: bytes) -> bytes:
        """Change the last byte of the first chunk that has bytes of the body."""
        has_body = not chunk.startswith(b"HTTP/") or (b"\r\n\r\n" in chunk and not chunk.endswith(b"\r\n\r\n"))
        if not link.is_get or link.is_body_flipped or not has_body:
            return chunk
        self.num_hits += 1
        link.is_body_flipped = True
        return chunk[:-1] + bytes([chunk[-1] ^ 1])

    async def _refuse(self, link: _Link, reader: asyncio.StreamReader) -> None:
        link.client.write(_REFUSAL % (len(_SLOW_DOWN), _SLOW_DOWN))
        link.client.write_eof()
        with contextlib.suppress(TimeoutError):  # a client that is still sending reads its answer when it has done so
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await reader.read(_CHUNK_BYTES):
                    pass


class FaultyServers(LocalServers):
    """Local servers behind one proxy each. `addresses` are the proxies', `direct` the servers' own."""

    postgres: FaultProxy
    redis: FaultProxy
    s3: FaultProxy
    direct: ServerAddresses

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir, is_durable=True)
        self._proxies = contextlib.ExitStack()

    def start(self) -> ServerAddresses:
        self.direct = super().start()
        self.postgres, self.redis, self.s3 = (
            self._proxies.enter_context(FaultProxy(port))
            for port in (
                port_of(self.direct.postgres_url),
                port_of(self.direct.redis_url),
                int(self.direct.storage.endpoint.rpartition(":")[2]),
            )
        )
        self.addresses = ServerAddresses(
            with_port(self.direct.postgres_url, self.postgres.port),
            with_port(self.direct.redis_url, self.redis.port),
            replace(self.direct.storage, endpoint=f"127.0.0.1:{self.s3.port}"),
        )
        return self.addresses

    def restart(self, name: str, *, blow: signal.Signals, lost: tuple[str, ...] = ()) -> None:
        """End a server by a signal, delete these of its directories, and start it again in its place."""
        child = self._supervisor.process(name)
        os.kill(child.pid, blow)
        wait_until(lambda: not child.is_alive, what=f"the end of {name}")
        for directory in lost:
            shutil.rmtree(self.data_dir / name / directory, ignore_errors=True)
        self._supervisor.start(child.spec)

    def stop_one(self, name: str) -> None:
        """Let one of the servers end as it should, for good."""
        self._supervisor.process(name).stop()

    def stop(self) -> None:
        self._proxies.close()
        super().stop()


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def with_port(url: str, port: int) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{port}"))
