"""Where trainers put what passes through them on its way: a directory a process, locked for as long as it lives.

Whoever was killed has left its directory, unlocked: the next trainer of the machine, or a worker that ends, removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "espalier-trainer-"


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yield a directory of this process's own within the system's temporary one, and remove it with all it holds.

    Raises OSError where there is no such place, or the one that the environment names is none.
    """
    remove_abandoned(Path(tempfile.gettempdir()))
    path, lock = _make()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove the directories of processes that live no more."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another's, or just removed
            lock = _lock(path)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _make() -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=os.environ.get("TMPDIR")))  # or nowhere, if that is no place
        with contextlib.suppress(OSError):  # taken for abandoned before it was locked
            lock = _lock(path)
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
