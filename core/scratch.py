"""Where processes put what passes through them: a directory of each one's own, locked for as long as it lives.

Whoever was killed has left its directory, unlocked: the next that makes one in the same place removes it.
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
    """Yield a directory of this process's own, and remove it with all it holds. Raises OSError where none can be made.

    What processes that live no more have left in the same place goes first.
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
    """Remove the directories of processes that live no more."""
    for path in (path for kind in get_args(Kind) for path in parent.glob(f"{_prefix(kind)}*")):
        with contextlib.suppress(OSError):  # another's, or just removed
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
        except (BlockingIOError, FileNotFoundError):  # taken for abandoned before it was locked
            continue
        except OSError:  # a file system that cannot lock directories, as NFS: nobody takes it for abandoned either
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
