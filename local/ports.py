"""Free loopback ports. After a restart the same ones are used again, unless another process has taken them.

They are drawn from below the range that systems use for the ports of outgoing connections.
"""

from __future__ import annotations

import json
import random
import socket
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from local.private_files import write_private

_LOWEST, _HIGHEST = 12000, 21999
# SeaweedFS' maintenance worker expects its admin server's gRPC port at this offset, whatever the server was configured
# with.
_ADMIN_GRPC_OFFSET = 10000


@dataclass(frozen=True)
class S3Ports:
    """The listeners of `weed mini`. Each has a second one for gRPC."""

    s3: int
    s3_grpc: int
    master: int
    master_grpc: int
    volume: int
    volume_grpc: int
    filer: int
    filer_grpc: int
    admin: int

    @property
    def admin_grpc(self) -> int:
        return self.admin + _ADMIN_GRPC_OFFSET


@dataclass(frozen=True)
class Ports:
    postgres: int
    redis: int
    s3: S3Ports

    @classmethod
    def choose(cls, path: Path) -> Ports:
        """Return the ports stored in a file if all are free, else new ones, which are stored there."""
        kept = cls.read(path)
        if kept is not None and kept.are_free:
            return kept
        postgres, redis, *rest = free_ports(2 + len(fields(S3Ports)))
        ports = cls(postgres, redis, S3Ports(*rest))
        write_private(path, json.dumps(asdict(ports)))
        return ports

    @classmethod
    def read(cls, path: Path) -> Ports | None:
        if not path.exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        return cls(kept["postgres"], kept["redis"], S3Ports(**kept["s3"]))

    @property
    def are_free(self) -> bool:
        s3_ports = [*asdict(self.s3).values(), self.s3.admin_grpc]
        return all(map(is_free, (self.postgres, self.redis, *s3_ports)))


def free_ports(count: int) -> list[int]:
    """Return free loopback ports, all different, each with a free port 10000 above it."""
    chosen: set[int] = set()
    while len(chosen) < count:
        port = random.randint(_LOWEST, _HIGHEST)  # noqa: S311 (a port is no secret)
        if is_free(port) and is_free(port + _ADMIN_GRPC_OFFSET):
            chosen.add(port)
    return list(chosen)


def is_free(port: int) -> bool:
    """Return whether a server could listen on a loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections that linger do not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
