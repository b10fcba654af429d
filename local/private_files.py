"""What a data directory holds is its owner's alone: directories are 0700 and files 0600, whatever they were before."""

from __future__ import annotations

import os
import stat
from pathlib import Path

UMASK = 0o077


def make_private(directory: Path) -> None:
    """Make a directory, or close one that is there and what lies in it.

    A directory that everybody shares, such as /tmp, stays as it is; so does what a link points to.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not directory.stat().st_mode & stat.S_ISVTX:
        directory.chmod(0o700)
        for path in directory.iterdir():
            if not path.is_symlink():
                path.chmod(0o700 if path.is_dir() else 0o600)


def open_private(path: str, flags: int) -> int:
    """Open a file for `open`, so that nobody else may read it if this makes it."""
    return os.open(path, flags, 0o600)


def write_private(path: Path, text: str) -> None:
    """Write a file whole or not at all, and let nobody else read it at any time."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        out.write(text)
    unfinished.replace(path)
