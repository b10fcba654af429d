"""The identity of a worker: `name:pid:boot`. Two workers on one host, or with one name, have two identities."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass, field

_BOOT_BYTES = 4


def _draw_boot() -> str:
    """Draw a value that tells this process from an earlier one with the same pid: in a container all have the same."""
    return secrets.token_hex(_BOOT_BYTES)


@dataclass(frozen=True)
class WorkerIdentity:
    """`given_name` is the name that operators gave it. Each process draws its own `boot`."""

    given_name: str
    pid: int = field(default_factory=os.getpid)
    boot: str = field(default_factory=_draw_boot)

    @classmethod
    def of_this_process(cls, given_name: str) -> WorkerIdentity:
        """Return a new identity, under the host's name if none is given."""
        return cls(given_name or socket.gethostname())

    def __str__(self) -> str:
        return f"{self.given_name}:{self.pid}:{self.boot}"
