"""Makes the content of a data directory its owner's alone: directories are 0700 and files 0600, whatever they were.

Other files in the directory are not touched.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

UMASK = 0o077
# The names that the stack makes in a data directory. A file that is not complete has the suffix `.new`.
_OWN_DIRECTORIES = frozenset(("postgres", "redis", "s3", "logs", "cache", "adapters"))
_OWN_FILES = frozenset(
    ("postgres.password", "launcher.pid", "api_key", "secrets.json", "ports.json", "stack.json"),
)


def close_data_dir(directory: Path) -> None:
    """Make a data directory, and what the stack made in it, private.

    If it contains other things too, like a checkout or a home, those and the mode of the directory stay as they are.
    """
    own = [path for path in directory.iterdir() if path.name.removesuffix(".new") in _OWN_DIRECTORIES | _OWN_FILES]
    if len(own) == len(list(directory.iterdir())):
        make_private(directory)
    for path in own:
        _close(path)


def make_private(directory: Path) -> None:
    """Make a directory, or make an existing one and its content private.

    A directory shared by all users, such as /tmp, stays as it is, and so do the targets of links.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not directory.stat().st_mode & stat.S_ISVTX:
        directory.chmod(0o700)
        for path in directory.iterdir():
            _close(path)


def open_private(path: str, flags: int) -> int:
    """A file opener for `open`: a file that it makes can be read by its owner only."""
    return os.open(path, flags, 0o600)


def write_private(path: Path, text: str) -> None:
    """Write a file completely or not at all, readable by its owner only at all times."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        out.write(text)
    unfinished.replace(path)


def _close(path: Path) -> None:
    if not path.is_symlink():
        path.chmod(0o700 if path.is_dir() else 0o600)
