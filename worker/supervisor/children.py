"""The supervisor's end of its trainer: starts the child process, sends orders, collects reports, ends it.

The child gets an environment without any credential. It ends by itself when this process is gone, because its standard
input closes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from core.domain.training import Frozen
from worker.messages import REPORTS, Alive, BaseLoaded, LoadBase, Report, encode_line

_SECRET_WORDS = ("DATABASE", "REDIS", "BROKER", "S3_", "PASS", "SECRET", "TOKEN", "KEY", "CREDENTIAL", "DSN")
_URL_WITH_CREDENTIALS = re.compile(r"://[^/\s]*@")
_STOP_SECONDS = 5.0


class TrainerGoneError(Exception):
    """The trainer process has ended. `exit_code` is negative for a signal."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"The trainer process ended with exit code {exit_code}.")
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.exit_code,))


class TrainerChild:
    """One trainer process, for one base model."""

    def __init__(self, order: LoadBase, *, threads: int | None, scratch_dir: Path | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worker.trainer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_child_environment(threads, scratch_dir),
            start_new_session=True,  # a terminal's Ctrl-C is the supervisor's to answer
        )
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._alive_at = time.monotonic()
        threading.Thread(target=self._read_reports, daemon=True, name="reports").start()
        self.send(order)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def silent_seconds(self) -> float:
        """How long ago the training loop was last known to turn."""
        return time.monotonic() - self._alive_at

    def send(self, order: Frozen) -> None:
        """Send an order. A trainer that is gone is noticed by `receive`, not here."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode_line(order))
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def receive(self, *, timeout_seconds: float) -> Report | None:
        """Return the next report, or None after the timeout. Raises TrainerGoneError."""
        try:
            report = self._reports.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if report is None:
            self._reports.put(None)
            raise TrainerGoneError(self._process.wait())
        if isinstance(report, BaseLoaded | Alive):
            self._alive_at = time.monotonic()
        return report

    def close(self) -> None:
        """End the trainer: close its input, and kill it if that is not enough."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the trainer at once, from whatever thread. Its input stays open: another thread may be writing."""
        self._process.kill()
        self._process.wait()

    def _read_reports(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._reports.put(REPORTS.validate_json(line))
        self._reports.put(None)


def _child_environment(threads: int | None, scratch_dir: Path | None) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not _is_secret(name, value)}
    environment["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
    environment["TOKENIZERS_PARALLELISM"] = "false"
    # Nothing here is compiled, and importing bitsandbytes would load the compiler: a quarter of a trainer's start.
    environment["TORCHDYNAMO_DISABLE"] = "1"
    if scratch_dir is not None:
        environment["TMPDIR"] = str(scratch_dir)
    if threads is not None:
        environment["ESPALIER_TRAINER_THREADS"] = str(threads)
    return environment


def _is_secret(name: str, value: str) -> bool:
    return any(word in name.upper() for word in _SECRET_WORDS) or _URL_WITH_CREDENTIALS.search(value) is not None
