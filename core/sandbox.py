"""Walls between processes that hold secrets and their children, which run other people's models, templates and rows.

A process that holds secrets hides its memory and passes only a few environment variables to a child. The child dies
with its parent and cannot look into other processes. If the child runs as root, it becomes a user of its own as soon as
it has read the files that only root may read. The kernel features exist on Linux only; elsewhere these functions do
nothing.
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
# From <linux/landlock.h>; the numbers of its calls are the same on every architecture.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT, _LANDLOCK_VERSION, _PATH_BENEATH = 444, 445, 446, 1, 1
_READ_FILE, _REFER = 1 << 2, 1 << 13
_MOVES_SINCE = 2  # Landlock's version 1 cannot leave files movable between directories
# Names the files of secrets that this process was given, so that its children can give up the right to read them.
_HIDDEN_FILES = "ESPALIER_HIDDEN_FILES"
_KEPT = sum(1 << each for each in (_CAP_CHOWN, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _CAP_SETGID, _CAP_SETUID))
# No account has this number, and no file belongs to it.
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
    """Return the environment variables that any program needs, and none that could be a secret."""
    plain = {name: value for name, value in os.environ.items() if name in _PLAIN_NAMES or name.startswith("LC_")}
    named = [path for name, path in os.environ.items() if path and _is_file_of_setting(name)]
    return plain | ({_HIDDEN_FILES: os.pathsep.join(named)} if named else {})


def _is_file_of_setting(name: str) -> bool:
    return name.startswith("ESPALIER_") and name.endswith("_FILE")


def hide_memory() -> None:
    """Forbid processes of the same user to read this one's memory or environment, or to trace it. No core dumps."""
    _prctl(_PR_SET_DUMPABLE, 0)


def die_with_parent() -> None:
    """Let the kernel kill this process, even a suspended one, when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def shed_capabilities() -> None:
    """Give up for ever what root may do to other processes. Call it before other threads start: it is per thread."""
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


def hide_secret_files() -> bool:
    """Give up for ever the right to read the files that held the parent's settings. Return whether that succeeded.

    A child has its parent's user and may read what that user may, so the kernel has to forbid it (Landlock, Linux
    5.19). Landlock only grants: everything except these files and the directories above them stays readable. Call it
    after `shed_capabilities`, before other threads start.
    """
    hidden = [Path(each).resolve() for each in os.environ.get(_HIDDEN_FILES, "").split(os.pathsep) if each]
    if not hidden:
        return True
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION) < _MOVES_SINCE:
        return False
    ruleset = libc.syscall(_LANDLOCK_CREATE, struct.pack("=Q", _READ_FILE | _REFER), 8, 0)
    try:
        for path in _beside(hidden):
            _let_read(libc, ruleset, path)
        return not libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _beside(hidden: list[Path]) -> set[Path]:
    """Return the paths that are neither these files nor directories above them, as high in the tree as possible."""
    above = {directory for path in hidden for directory in path.parents}
    return {entry for directory in above if directory.is_dir() for entry in directory.iterdir()} - above - set(hidden)


def _let_read(libc: ctypes.CDLL, ruleset: int, path: Path) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # removed meanwhile, or another user's: this process could not read it anyway
        return
    try:
        rights = _READ_FILE | (_REFER if path.is_dir() and not path.is_symlink() else 0)
        libc.syscall(_LANDLOCK_ADD, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
    finally:
        os.close(place)


def leave_root(*directories: Path) -> None:
    """Become a user that owns these directories and nothing else, if this process runs as root.

    It stays root if other users cannot reach these directories, or Python's own files, which are loaded when needed.
    """
    needed = (*(each.parent for each in directories), *map(Path, sys.path), Path(sys.base_prefix))
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(_is_open_to_all, needed)):
        return
    for directory in directories:
        os.chown(directory, CONFINED_USER, CONFINED_USER)
    os.setgroups([])
    os.setresgid(CONFINED_USER, CONFINED_USER, CONFINED_USER)
    os.setresuid(CONFINED_USER, CONFINED_USER, CONFINED_USER)
    die_with_parent()  # the kernel clears this setting when the user changes


def _is_open_to_all(path: Path) -> bool:
    real = path.resolve()
    return not real.exists() or all(each.stat().st_mode & 0o001 for each in (real, *real.parents) if each.is_dir())


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
