"""Places where a test may kill this process as a power cut would: `CRASHPOINT=name:n` dies at the n-th pass of a place.

Inert without the variable. With a third part, `name:n:path`, it dies once only, however often it is started again: that
file is the fuse, and a crash burns it.
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
    """Each stands just behind a write that counts, and before whatever tells of it."""

    POST_INSERT = "post_insert"  # a job's row is committed, its tenant not yet answered
    POST_CLAIM = "post_claim"  # a claim is committed, the trainer not yet told
    UPLOAD = "upload"  # before each part of an artifact's file that the trainer sends
    PRE_FINISH = "pre_finish"  # an adapter is stored and verified, its job not yet ended
    POST_FINISH = "post_finish"  # a job has succeeded in the database, and nobody else knows


def reach(point: CrashPoint) -> None:
    """Die here if this is the place and the pass that the environment names."""
    if point != _ARMED_NAME:
        return
    number, _, fuse = _REST.partition(":")
    if next(_passes) != int(number) or (fuse and not Path(fuse).exists()):
        return
    if fuse:
        Path(fuse).unlink()
    os.kill(os.getpid(), signal.SIGKILL)
