"""Who a worker is: `name:pid:boot`. Two workers on one host, or of one name, have two identities, and both count."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass, field

_BOOT_BYTES = 4


def _draw_boot() -> str:
    """Draw what tells this process from an earlier one with the same pid: in a container every process has it."""
    return secrets.token_hex(_BOOT_BYTES)


@dataclass(frozen=True)
class WorkerIdentity:
    """`given_name` is what operators call it, every process draws a `boot` of its own."""

    given_name: str
    pid: int = field(default_factory=os.getpid)
    boot: str = field(default_factory=_draw_boot)

    @classmethod
    def of_this_process(cls, given_name: str) -> WorkerIdentity:
        """Return a new identity, under the host's name where none is given."""
        return cls(given_name or socket.gethostname())

    def __str__(self) -> str:
        return f"{self.given_name}:{self.pid}:{self.boot}"
