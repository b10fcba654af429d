"""What a data directory holds is its owner's alone: directories are 0700 and files 0600, whatever they were before.

What others keep beside it is not touched.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

UMASK = 0o077
# What the stack makes in a data directory; a file that is not whole yet has `.new` behind its name.
_OWN_DIRECTORIES = frozenset(("postgres", "redis", "s3", "logs", "cache", "adapters"))
_OWN_FILES = frozenset(
    ("postgres.password", "launcher.pid", "api_key", "secrets.json", "ports.json", "stack.json"),
)


def close_data_dir(directory: Path) -> None:
    """Close a data directory, and what the stack has made in it.

    Where other things lie too, as in a checkout or a home, they and the directory's own mode stay as they are.
    """
    own = [path for path in directory.iterdir() if path.name.removesuffix(".new") in _OWN_DIRECTORIES | _OWN_FILES]
    if len(own) == len(list(directory.iterdir())):
        make_private(directory)
    for path in own:
        _close(path)


def make_private(directory: Path) -> None:
    """Make a directory, or close one that is there and what lies in it.

    A directory that everybody shares, such as /tmp, stays as it is; so does what a link points to.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not directory.stat().st_mode & stat.S_ISVTX:
        directory.chmod(0o700)
        for path in directory.iterdir():
            _close(path)


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


def _close(path: Path) -> None:
    if not path.is_symlink():
        path.chmod(0o700 if path.is_dir() else 0o600)
