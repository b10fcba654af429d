"""The trainer's end of the two pipes, and its one inbox.

Orders from the supervisor and results of background work arrive in the same queue, so the loop waits in one place. When
the supervisor is gone, the thread that reads orders ends this process at once, whatever it was doing. The process also
ends if that thread fails, for example at a line that is no order, because a trainer without orders cannot be stopped.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

from core.domain.values import Frozen
from core.telemetry.liveness import PROCESS
from worker.messages import ORDERS, UrlsGranted, UrlsWanted, encode_line
from worker.trainer.failures import JobStoppedError, UrlRefusedError

_URL_WAIT_SECONDS = 60.0
_ORPHANED_EXIT_CODE = 3

_NUM_BACKGROUND_THREADS = 4

T = TypeVar("T")


def start_pool(num_threads: int) -> ThreadPoolExecutor:
    """Return a pool whose threads all run already: a process short of memory may not be able to start one later."""
    pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="background")
    all_started = threading.Barrier(num_threads + 1)
    for _ in range(num_threads):
        pool.submit(all_started.wait)
    all_started.wait()
    return pool


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return this process's standard input and output as files that no other code reads or writes."""
    # A separate reader: a thread that waits in sys.stdin would hold its lock at the interpreter's end.
    orders = os.fdopen(os.dup(0), "rb")
    reports = os.fdopen(os.dup(1), "wb", buffering=0)
    # Libraries print, and their output must not reach the pipe for messages.
    os.dup2(2, 1)
    return orders, reports


class Channel:
    """Sends reports, receives orders, and runs work in the background."""

    def __init__(self, orders: BinaryIO, reports: BinaryIO) -> None:
        self._orders, self._reports = orders, reports
        self._send_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # By lease token and artifact: the queues of the threads that wait for URLs. None in a queue means that none
        # will come.
        self._grants: dict[tuple[int, str], queue.SimpleQueue[dict[str, str] | None]] = {}
        self._background = start_pool(_NUM_BACKGROUND_THREADS)
        PROCESS.start_thread(self._read_orders, name="orders")

    def send(self, report: Frozen) -> None:
        with self._send_lock:
            self._reports.write(encode_line(report))

    def receive(self, *, wait_seconds: float | None) -> Any:
        """Return the next order or deferred call, or None if none comes in that time (None waits for ever)."""
        try:
            return self._inbox.get(block=wait_seconds != 0, timeout=wait_seconds)
        except queue.Empty:
            return None

    def run_in_background(self, work: Callable[[], T]) -> Future[T]:
        """Run `work`, which is short or stores something, on a thread."""
        return self._background.submit(work)

    def deliver(self, future: Future[T], then: Callable[[Future[T]], None]) -> None:
        """Let the loop call `then` with the future when it is done, between two steps."""
        future.add_done_callback(lambda done: self._inbox.put(lambda: then(done)))

    def request_urls(self, wanted: UrlsWanted, *, check: Callable[[], None]) -> dict[str, str]:
        """Ask for presigned URLs and wait for them. For background threads only. Raises UrlRefusedError.

        `check` raises when the job was stopped; after that `refuse_urls` ends the wait.
        """
        key = wanted.lease_token, wanted.artifact
        # First the queue, then the check whether the job was stopped: so a stop after the check finds the queue.
        grants = self._grants[key] = queue.SimpleQueue()
        try:
            check()
            self.send(wanted)
            urls = grants.get(timeout=_URL_WAIT_SECONDS)
        except queue.Empty:
            raise UrlRefusedError("No upload was granted in time.") from None
        finally:
            del self._grants[key]
        if urls is None:
            raise JobStoppedError("The job was stopped.")
        return urls

    def refuse_urls(self, lease_token: int) -> None:
        """End all waits for URLs of a job that was stopped, because none will be granted."""
        for (token, _artifact), grants in tuple(self._grants.items()):
            if token == lease_token:
                grants.put(None)

    def _read_orders(self) -> None:
        for line in self._orders:
            order = ORDERS.validate_json(line)
            if isinstance(order, UrlsGranted):
                if (grants := self._grants.get((order.lease_token, order.artifact))) is not None:
                    grants.put(order.urls)
            else:
                self._inbox.put(order)
        os._exit(_ORPHANED_EXIT_CODE)
