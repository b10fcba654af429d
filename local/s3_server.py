"""A real S3 server (SeaweedFS) on loopback ports, with its data in one directory. It reports to nobody."""

from __future__ import annotations

import signal
from pathlib import Path

from core.settings import StorageConfig
from core.storage import S3ObjectStore, StorageError
from local.binaries import find_s3
from local.ports import S3Ports
from local.processes import ProcessSpec

BUCKET = "espalier"
_PROBE = "readiness-probe"
_FLAGS = (
    "-dir=.",
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    # Relative to the working directory: the path of a Unix socket holds about a hundred bytes only.
    "-s3.localSocket=s3.sock",
    "-filer.localSocket=filer.sock",
    "-master.telemetry=false",
    "-admin.ui=false",
    "-volume.preStopSeconds=0",  # in which a cluster would hear that this one leaves
    "-webdav=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.allowDeleteBucketNotEmpty=false",
    "-s3.autoCreateBucket=false",
)


class S3Server:
    """What to run, and how to tell that it answers."""

    def __init__(self, data_dir: Path, *, ports: S3Ports, access_key: str, secret_key: str) -> None:
        self._binary = find_s3()
        self._directory = data_dir / "s3"
        self._ports = ports
        self.config = StorageConfig(
            endpoint=f"127.0.0.1:{ports.s3}", access_key=access_key, secret_key=secret_key, bucket=BUCKET
        )

    def prepare(self) -> ProcessSpec:
        self._directory.mkdir(exist_ok=True, mode=0o700)
        (self._directory / "mini.options").unlink(missing_ok=True)  # it would bring back the last start's ports
        self.remove_sockets()
        env = {
            "AWS_ACCESS_KEY_ID": self.config.access_key,
            "AWS_SECRET_ACCESS_KEY": self.config.secret_key,
            # At half of it, which it nearly fills, collecting garbage takes a tenth of a core at rest and makes an
            # upload three times as dear; without any limit it grows to 700 MB.
            "GOMEMLIMIT": "400MiB",
            "TMPDIR": str(self._directory),  # its own log files would go to the system's
        }
        argv = [str(self._binary), "mini", *_FLAGS, *self._listeners()]
        return ProcessSpec("s3", argv, env, death_signal=signal.SIGTERM, cwd=self._directory)

    def answers(self) -> bool:
        """Return whether it takes an object, having made the bucket if need be.

        It lists and makes buckets a moment before its first volume can be written to.
        """
        store = S3ObjectStore(self.config)
        try:
            store.ensure_bucket()
            store.put_bytes(_PROBE, b"ready?", content_type="text/plain")
            store.delete(_PROBE)
        except StorageError:
            return False
        return True

    def remove_sockets(self) -> None:
        """Remove what it leaves in /tmp, whatever TMPDIR says, when it has ended."""
        for name, (_, port) in self._pairs.items():
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108 (its own choice)

    @property
    def _pairs(self) -> dict[str, tuple[int, int]]:
        ports = self._ports
        return {
            "s3": (ports.s3, ports.s3_grpc),
            "master": (ports.master, ports.master_grpc),
            "volume": (ports.volume, ports.volume_grpc),
            "filer": (ports.filer, ports.filer_grpc),
            "admin": (ports.admin, ports.admin_grpc),
        }

    def _listeners(self) -> list[str]:
        flags = [f"-{name}.port={port}" for name, (port, _) in self._pairs.items()]
        return flags + [f"-{name}.port.grpc={port}" for name, (_, port) in self._pairs.items()]
