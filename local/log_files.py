"""The output of a child process, in a file that is replaced when it is full, while the child continues.

The child writes into a pipe, so it never holds the file open. Files are cut between lines. A full disk loses lines. It
never stops the child, which would otherwise block on a full pipe.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from pathlib import Path

from local.private_files import open_private

FILE_BYTES = 10 * 2**20
# Including the current one. A line that is longer than a file is cut.
NUM_FILES = 5
# How much a child may print while the launcher is suspended, as by Ctrl-Z, before it blocks. Linux allows every user
# this much.
_PIPE_BYTES = 2**20


class LogFile:
    """The file at `path`. A thread fills it from a pipe, and ends when the last writer has closed the pipe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._replacing = threading.Lock()  # between two names of the full file, the path is no file's
        self._open()
        if self._size_bytes >= FILE_BYTES:
            self._replace()
        self._output, self.input = os.pipe()
        with contextlib.suppress(OSError, AttributeError):  # not on Linux, or the user has too many pipes
            fcntl.fcntl(self.input, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._thread = threading.Thread(target=self._fill, daemon=True, name=f"log of {path.stem}")
        self._thread.start()

    def close_input(self) -> None:
        """Leave the pipe to the child. Call it once, as soon as the child has the pipe or failed to start."""
        os.close(self.input)

    def read_end(self, num_bytes: int) -> bytes:
        """Return the last bytes of the current file, of which there is one also while it is replaced."""
        with self._replacing, self._path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - num_bytes))
            return log.read()

    def wait_for_end(self, *, timeout_seconds: float) -> None:
        """Wait until all output is in the file. A grandchild that still lives may print more."""
        self._thread.join(timeout_seconds)

    def _fill(self) -> None:
        try:
            while chunk := os.read(self._output, _PIPE_BYTES):
                self._take(chunk)
        finally:
            os.close(self._output)
            os.close(self._file)

    def _take(self, chunk: bytes) -> None:
        while self._size_bytes + len(chunk) > FILE_BYTES:
            line_end = chunk.find(b"\n", max(0, FILE_BYTES - self._size_bytes - 1)) + 1
            end = min(line_end or len(chunk) + 1, max(0, 2 * FILE_BYTES - self._size_bytes))
            if end > len(chunk):
                break  # the line continues
            self._write(chunk[:end])
            chunk = chunk[end:]
            if not self._replace():
                break
        self._write(chunk)

    def _write(self, content: bytes) -> None:
        with contextlib.suppress(OSError):
            while content:
                num_written = os.write(self._file, content)
                self._size_bytes += num_written
                content = content[num_written:]

    def _replace(self) -> bool:
        """Start a new file. If that fails, continue with the old one."""
        full = self._file
        with self._replacing, contextlib.suppress(OSError):
            for number in range(NUM_FILES - 1, 0, -1):
                older = self._numbered(number - 1)
                if older.exists():
                    older.replace(self._numbered(number))
            self._open()
            os.close(full)
            return True
        return False

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    def _open(self) -> None:
        self._file = open_private(str(self._path), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        self._size_bytes = os.fstat(self._file).st_size
