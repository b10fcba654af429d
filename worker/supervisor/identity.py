"""Who a worker is: `name:pid:boot`, so that two on one host, or of one name, are two and their slots add up."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass, field

_BOOT_BYTES = 4


def _draw_boot() -> str:
    """Tell this process from one before it with the same pid: in a container, that is every one."""
    return secrets.token_hex(_BOOT_BYTES)


@dataclass(frozen=True)
class WorkerIdentity:
    """`given_name` is what operators call it, `boot` is drawn anew by every process."""

    given_name: str
    pid: int = field(default_factory=os.getpid)
    boot: str = field(default_factory=_draw_boot)

    @classmethod
    def of_this_process(cls, given_name: str) -> WorkerIdentity:
        """Return a new identity, under the host's name where none is given."""
        return cls(given_name or socket.gethostname())

    def __str__(self) -> str:
        return f"{self.given_name}:{self.pid}:{self.boot}"
