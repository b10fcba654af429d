"""Child processes of the launcher. Each logs to its own files, and none outlives the launcher.

On Linux the kernel ends a child when the thread that started it ends, even by SIGKILL. So children must be started from
a thread that lives as long as they should.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from local.log_files import LogFile
from local.private_files import UMASK, make_private

_LOG_TAIL_BYTES = 2000
_LAST_WORDS_SECONDS = 5.0
_POLL_SECONDS = 0.02
# The kernel ends the child from `setpriv` on. If the launcher died before that, this shell sees another parent and
# exits.
_UNLESS_ORPHANED = '[ "$PPID" = "$0" ] && exec "$@"'


class ProcessFailedError(Exception):
    """A child process did not start or has ended. The message contains the end of its log."""


@dataclass(frozen=True)
class ProcessSpec:
    """A child process. `stop_signal` asks it to end; `death_signal` is sent to it when the launcher dies.

    `prefix` is a command that runs the rest with fewer rights. `inherited_fds` stay open in the child.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL
    stop_seconds: float = 10.0
    prefix: Sequence[str] = ()
    cwd: Path | None = None
    inherited_fds: Sequence[int] = ()


class ChildProcess:
    """One running child."""

    def __init__(self, spec: ProcessSpec, log_dir: Path) -> None:
        make_private(log_dir)
        self.spec = spec
        self.log_path = log_dir / f"{spec.name}.log"
        self._log = LogFile(self.log_path)
        try:
            self._process = subprocess.Popen(
                [*spec.prefix, *as_mortal(spec)],
                env={**os.environ, **spec.env},
                cwd=spec.cwd,
                stdin=subprocess.DEVNULL,
                stdout=self._log.input,
                stderr=self._log.input,
                pass_fds=tuple(spec.inherited_fds),
                umask=UMASK,
                start_new_session=True,  # Ctrl-C reaches only the launcher, which stops its children in order
            )
        finally:
            self._log.close_input()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_until(self, is_ready: Callable[[], bool], *, timeout_seconds: float) -> None:
        """Wait for a condition. Raises ProcessFailedError when the child ends first or the time is up."""
        deadline = time.monotonic() + timeout_seconds
        while not is_ready():
            if not self.is_alive or time.monotonic() > deadline:
                state = "did not answer in time" if self.is_alive else f"ended ({self._process.returncode})"
                raise ProcessFailedError(
                    f"{self.spec.name} {state}. Its log, {self.log_path}, ends:\n{self.log_tail()}"
                )
            time.sleep(_POLL_SECONDS)

    def log_tail(self) -> str:
        """Return the end of the child's output. If it has ended, this includes its last line."""
        if not self.is_alive:
            self._log.wait_for_end(timeout_seconds=_LAST_WORDS_SECONDS)
        return self._log.read_end(_LOG_TAIL_BYTES).decode(errors="replace")

    def stop(self) -> None:
        """Ask the child to end, and kill it if it does not."""
        self.ask_to_stop()
        try:
            self._process.wait(self.spec.stop_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._log.wait_for_end(timeout_seconds=_LAST_WORDS_SECONDS)

    def ask_to_stop(self) -> None:
        if self.is_alive:
            self._process.send_signal(self.spec.stop_signal)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def as_mortal(spec: ProcessSpec) -> list[str]:
    """Return the command with a prefix that makes it die with this process, where the system has one."""
    if not shutil.which("setpriv"):
        return list(spec.argv)
    death_signal = spec.death_signal.name.removeprefix("SIG")
    return ["setpriv", "--pdeathsig", death_signal, "sh", "-c", _UNLESS_ORPHANED, str(os.getpid()), *spec.argv]
