"""Walls between processes that hold secrets and their children, which work on others' models, templates and rows.

A process that holds secrets hides its memory, and gives a child a few names of the environment only. The child dies
with its parent and may not look into other processes. Where it is root's, it becomes a user of its own as soon as it
has read what only root may read. The kernel's part of this is Linux'; elsewhere those functions do nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from pathlib import Path

# From <linux/prctl.h> and <linux/capability.h>.
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION = 0x20080522
_CAP_CHOWN, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _CAP_SETGID, _CAP_SETUID = 0, 1, 2, 6, 7
_KEPT = sum(1 << each for each in (_CAP_CHOWN, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _CAP_SETGID, _CAP_SETUID))
# Nobody's: no account has this number, and no file.
CONFINED_USER = 65533

_PLAIN_NAMES = frozenset(
    {
        "HOME",
        "LANG",
        "LANGUAGE",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "LOGNAME",
        "PATH",
        "TMPDIR",
        "TZ",
        "USER",
        "VIRTUAL_ENV",
    }
    | {"PYTHONHOME", "PYTHONPATH"}
)


def plain_environment() -> dict[str, str]:
    """Return what any program needs of this process's environment, and nothing that could be a secret."""
    return {name: value for name, value in os.environ.items() if name in _PLAIN_NAMES or name.startswith("LC_")}


def hide_memory() -> None:
    """Let no process of the same user read this one's memory or environment, or trace it; it leaves no core dump."""
    _prctl(_PR_SET_DUMPABLE, 0)


def die_with_parent() -> None:
    """Let the kernel kill this process, stopped or not, when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def shed_capabilities() -> None:
    """Give up for ever what root may do to other processes. Call it before there are threads: it is a thread's own."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if sys.platform != "linux" or os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, state = struct.pack("=Ii", _CAPABILITY_VERSION, 0), ctypes.create_string_buffer(24)
    libc.capget(header, state)
    _, permitted, _, _, _, _ = struct.unpack("=6I", state.raw)
    kept = permitted & _KEPT
    if libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "The capabilities of this process could not be given up.")


def leave_root(*directories: Path) -> None:
    """Become a user who owns these directories and nothing else, if this is root's process.

    It stays root's where others cannot reach them, or Python's own files, which are loaded as they are needed.
    """
    needed = (*(each.parent for each in directories), *map(Path, sys.path), Path(sys.base_prefix))
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(_is_open_to_all, needed)):
        return
    for directory in directories:
        os.chown(directory, CONFINED_USER, CONFINED_USER)
    os.setgroups([])
    os.setresgid(CONFINED_USER, CONFINED_USER, CONFINED_USER)
    os.setresuid(CONFINED_USER, CONFINED_USER, CONFINED_USER)
    die_with_parent()  # the kernel forgets it when the user changes


def _is_open_to_all(path: Path) -> bool:
    real = path.resolve()
    return not real.exists() or all(each.stat().st_mode & 0o001 for each in (real, *real.parents) if each.is_dir())


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
