"""An object store for the tests of the trainer. It can wait or refuse, and remembers the requests."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.waiting import repeat_until, wait_until
from worker.messages import (
    RemoteFile,
)

ENDLESS = "endless"


class Store(ThreadingHTTPServer):
    """Objects by path, and who has asked for what. A GET waits for as long as `is_open` is not set.

    An upload below `held` waits until it is below it no more; `watch` is called at every upload.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _StoreRequest)
        self.objects: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.refused: str | None = None  # uploads and downloads below this path
        self.refusal: tuple[HTTPStatus, bytes] = (HTTPStatus.FORBIDDEN, b"")
        self.num_granted = 0
        self.num_refused = 0
        self.num_to_refuse = math.inf
        self.held: str | None = None
        self.watch: Callable[[], object] = lambda: None
        self.is_open = threading.Event()
        self.is_open.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def add(self, path: str, content: bytes) -> RemoteFile:
        self.objects[f"/{path}"] = content
        return RemoteFile(url=self.url(path), sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))

    def add_rows(self, path: str, *, num_rows: int = 2) -> RemoteFile:
        rows = [
            [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}] for n in range(num_rows)
        ]
        return self.add(path, "\n".join(json.dumps({"messages": row}) for row in rows).encode())

    def add_conversations(self, path: str, turns: Sequence[tuple[str, str]]) -> RemoteFile:
        """Store rows of a question and its answer each."""
        rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
        return self.add(path, "\n".join(json.dumps({"messages": row}) for row in rows).encode())


class _StoreRequest(BaseHTTPRequestHandler):
    server: Store

    def do_GET(self) -> None:
        self.server.fetched.append(self.path)
        self.server.is_open.wait()
        if self._is_refused():
            self._answer(*self.server.refusal)
            return
        if self.path == f"/{ENDLESS}":
            self._drip()
            return
        content = self.server.objects.get(self.path)
        self._answer(HTTPStatus.NOT_FOUND if content is None else HTTPStatus.OK, content or b"")

    def do_PUT(self) -> None:
        self.server.watch()
        content = self.rfile.read(int(self.headers["content-length"]))
        wait_until(lambda: self.server.held is None or not self.path.startswith(self.server.held))
        if self._is_refused() and self.server.num_refused < self.server.num_to_refuse:
            self.server.num_refused += 1
            self._answer(*self.server.refusal)
            return
        self.server.objects[self.path] = content
        self._answer(HTTPStatus.OK, b"")

    def _is_refused(self) -> bool:
        return self.server.refused is not None and self.path.startswith(self.server.refused)

    def _drip(self) -> None:
        self.send_response(HTTPStatus.OK)
        self.end_headers()
        with suppress(ConnectionError):
            repeat_until(lambda: False, lambda: self.wfile.write(bytes(2**20)))

    def _answer(self, status: HTTPStatus, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: Any) -> None:
        pass


def break_hash(file: RemoteFile) -> RemoteFile:
    return file.model_copy(update={"sha256": "0" * 64})
