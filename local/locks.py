"""The lock of a data directory: one launcher at a time, and none before the servers of the last one are gone.

The servers inherit the open lock. So it stays held after a launcher was killed, until the last server has ended.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from local.private_files import open_private

_LEFTOVER_SECONDS = 20.0
_POLL_SECONDS = 0.05


class AlreadyRunningError(Exception):
    """Another launcher holds this data directory."""


class DataDirLock:
    """An exclusive hold on a data directory, from construction to `close`. Raises AlreadyRunningError."""

    def __init__(self, data_dir: Path) -> None:
        self._file = open(_path(data_dir), "a+", encoding="utf-8", opener=open_private)
        try:
            self._acquire(data_dir)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    def _acquire(self, data_dir: Path) -> None:
        deadline = time.monotonic() + _LEFTOVER_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = _read_pid(data_dir)
                if (pid is not None and is_running(pid)) or time.monotonic() > deadline:
                    raise AlreadyRunningError(_refusal(data_dir, pid)) from None
                time.sleep(_POLL_SECONDS)  # the servers of a killed launcher are still stopping
            else:
                return


def find_launcher(data_dir: Path) -> int | None:
    """Return the pid of the launcher that holds a data directory, or None."""
    if not _path(data_dir).exists():
        return None
    with _path(data_dir).open("r", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _read_pid(data_dir)
            return pid if pid is not None and is_running(pid) else None
    return None


def is_running(pid: int) -> bool:
    """Return whether a process runs. A zombie, which has ended and waits for its parent, does not."""
    status = Path(f"/proc/{pid}/stat")
    if Path("/proc/self").exists():
        try:
            return status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _path(data_dir: Path) -> Path:
    return data_dir / "launcher.pid"


def _read_pid(data_dir: Path) -> int | None:
    text = _path(data_dir).read_text(encoding="utf-8").strip()
    return int(text) if text.isdigit() else None


def _refusal(data_dir: Path, pid: int | None) -> str:
    if pid is not None and is_running(pid):
        return f"{data_dir} is in use by process {pid}. Stop it (espalier down), or choose another --data-dir."
    return f"{data_dir} is in use by servers of a launcher that is gone (process {pid}). Stop them and start again."
