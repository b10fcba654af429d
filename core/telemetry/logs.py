"""Structured logs: one JSON object a line on standard error, never a tenant's data.

All lines have this form. What libraries log or warn about goes through the same renderer, and so do tracebacks that end
a process or a thread. What a library in C, Celery or a child process prints comes out of a pipe that replaces standard
output and standard error. Each of its lines is wrapped as `output.printed`.

A line that cannot be written, because the disk is full or the reader has left, is dropped. The work continues.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TextIO

import structlog

from core.telemetry.liveness import PROCESS

log = structlog.get_logger()
_MAX_PRINTED_LENGTH = 2000
_STOP_SECONDS = 1.0
_log_file: TextIO | None = None  # set by `configure_logs`: standard error as this process received it


def configure_logs(process: str, *, captured: Sequence[int] = (1, 2)) -> None:
    """Send every line of this process, those of libraries too, through one JSON renderer.

    `captured` are the file descriptors whose output is wrapped. A process whose children write logs themselves captures
    none, so that they do not write through its pipe.
    """
    global _log_file  # noqa: PLW0603 (a process has one log)
    _log_file = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    _route_libraries(process, _log_file)
    sys.excepthook = _log_end_of_process
    threading.excepthook = _log_end_of_thread
    sys.unraisablehook = _log_unraisable
    if captured:
        capture_printed(captured)


def find_log_file() -> int | None:
    """Return the file descriptor of the log, for a child that writes JSON itself. None before `configure_logs`."""
    return _log_file.fileno() if _log_file is not None else None


def _route_libraries(process: str, stream: TextIO) -> None:
    def name_process(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**event, "process": process}  # not a bound variable, because new threads do not inherit those

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        name_process,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ],
    )
    lines = _LossyHandler(stream)
    lines.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[lines], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


class _LossyHandler(logging.StreamHandler[TextIO]):
    """Drops a line that cannot be written.

    The library's own handler reports such a line on standard error. Here that is the pipe, which would fill and block.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the library's name)
        pass


def _log_end_of_process(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    log.critical("process.failed", exc_info=(kind, error, at))


def _log_end_of_thread(ended: threading.ExceptHookArgs) -> None:
    name = ended.thread.name if ended.thread is not None else None
    log.critical("thread.failed", thread=name, exc_info=(ended.exc_type, ended.exc_value, ended.exc_traceback))


def _log_unraisable(raised: Any) -> None:
    log.error("error.unraisable", exc_info=(raised.exc_type, raised.exc_value, raised.exc_traceback))


def capture_printed(captured: Sequence[int] = (1, 2)) -> None:
    """Replace the file descriptors with a pipe, and read its other end in a thread. Logs must be configured first."""
    stream = _log_file
    assert stream is not None
    reading, writing = os.pipe()
    for number in captured:
        os.dup2(writing, number)
    os.close(writing)
    # Without this thread the pipe fills, and every writer blocks for ever.
    relay = PROCESS.start_thread(lambda: _relay(reading, stream), name="printed output")
    atexit.register(_release, captured, stream, relay)


def _relay(reading: int, stream: TextIO) -> None:
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            if _is_json_object(line):
                with contextlib.suppress(OSError):
                    os.write(stream.fileno(), line)
            elif text := line.decode(errors="backslashreplace").strip():
                log.info("output.printed", line=text[:_MAX_PRINTED_LENGTH])


def _is_json_object(line: bytes) -> bool:
    try:
        return line.startswith(b"{") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _release(captured: Sequence[int], stream: TextIO, relay: threading.Thread) -> None:
    """Restore the file descriptors, and let the relay write what is still in the pipe."""
    sys.stdout.flush()
    sys.stderr.flush()
    for number in captured:
        os.dup2(stream.fileno(), number)
    relay.join(_STOP_SECONDS)
