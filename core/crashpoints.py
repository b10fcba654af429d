"""Places where a test may kill this process, as a power cut would.

`CRASHPOINT=name:n` kills it at the n-th pass of a place. Without the variable this does nothing. With a third part,
`name:n:path`, the process dies only once, however often it is started again: it dies only while the file `path` exists,
and removes it first.
"""

from __future__ import annotations

import itertools
import os
import signal
from enum import StrEnum
from pathlib import Path

_ARMED_NAME, _, _REST = os.environ.get("CRASHPOINT", "").partition(":")
_passes = itertools.count(1)


class CrashPoint(StrEnum):
    """Each place but `UPLOAD` follows a write that is committed or stored, and precedes every message about it."""

    POST_INSERT = "post_insert"  # a job's row is committed, its tenant has no answer yet
    POST_CLAIM = "post_claim"  # a claim is committed, the trainer has no order yet
    UPLOAD = "upload"  # before each part of an artifact's file that the trainer sends
    PRE_FINISH = "pre_finish"  # an adapter is stored and verified, its job is still running
    POST_FINISH = "post_finish"  # a job has succeeded in the database, no message has been sent


def reach(point: CrashPoint) -> None:
    """Die here if the environment names this place and this pass."""
    if point != _ARMED_NAME:
        return
    number, _, fuse = _REST.partition(":")
    if next(_passes) != int(number) or (fuse and not Path(fuse).exists()):
        return
    if fuse:
        Path(fuse).unlink()
    os.kill(os.getpid(), signal.SIGKILL)
