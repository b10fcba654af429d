"""Scratch directories: one for each process, locked as long as the process lives.

A killed process leaves its directory behind, without the lock. The next process that makes one in the same place
removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["api", "base", "trainer"]


@contextlib.contextmanager
def scratch_directory(kind: Kind, parent: Path) -> Iterator[Path]:
    """Yield a directory of this process, and remove it with its content. Raises OSError where none can be made.

    First removes the directories that dead processes have left in the same place.
    """
    remove_abandoned(parent)
    path, lock = _make(kind, parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove the directories of dead processes."""
    for path in (path for kind in get_args(Kind) for path in parent.glob(f"{_prefix(kind)}*")):
        with contextlib.suppress(OSError):  # it belongs to a living process, or was just removed
            lock = _lock(path)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _prefix(kind: Kind) -> str:
    return f"espalier-{kind}-"


def _make(kind: Kind, parent: Path) -> tuple[Path, int | None]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_prefix(kind), dir=parent))
        try:
            lock = _lock(path)
        except (BlockingIOError, FileNotFoundError):  # another process removed it before it was locked
            continue
        except OSError:  # NFS, say, cannot lock directories, so no process takes this one for abandoned
            return path, None
        if path.exists():
            return path, lock
        os.close(lock)


def _lock(path: Path) -> int:
    """Lock a directory until the descriptor is closed. Raises OSError when it is locked, gone or another user's."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
