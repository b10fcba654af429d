"""A real S3 server (SeaweedFS) on loopback ports, with its data in one directory. It sends no telemetry.

SeaweedFS consists of five servers with two listeners each. Only the S3 gateway asks for keys. The other listeners use
TLS and accept only clients with a certificate that each start makes anew. So neither another user of the machine nor a
web page in a browser gets past the handshake.
"""

from __future__ import annotations

import errno
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

from core.settings import StorageConfig
from core.storage import S3ObjectStore, StorageError
from local.binaries import find_s3
from local.certificates import make_certificate
from local.ports import S3Ports
from local.private_files import make_private, write_private
from local.processes import ProcessSpec
from local.versions import ask_program, claim_data

BUCKET = "espalier"
_PROBE = "readiness-probe"
_ADDRESS = "127.0.0.1"
_FLAGS = (
    "-dir=.",
    f"-ip={_ADDRESS}",
    f"-ip.bind={_ADDRESS}",
    # Relative to the working directory, because the path of a Unix socket is limited to about a hundred bytes.
    "-s3.localSocket=s3.sock",
    "-filer.localSocket=filer.sock",
    "-master.telemetry=false",
    "-admin.ui=false",
    "-volume.preStopSeconds=0",  # a pause for a cluster to notice the shutdown; there is none
    "-webdav=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.allowDeleteBucketNotEmpty=false",
    "-s3.autoCreateBucket=false",
    "-s3.allowedOrigins=",  # empty means none; the default allows every web page
)
_YOUNG_SECONDS = 1.0  # a server makes its socket a moment before it listens
_CERTIFICATE, _KEY = "door.pem", "door.key"
_HTTP_DOORS = ("master", "volume", "filer", "admin")
_GRPC_ROLES = (*_HTTP_DOORS, "s3", "worker", "client")


class S3Server:
    """How to start SeaweedFS, and how to see that it answers."""

    def __init__(self, data_dir: Path, *, ports: S3Ports, access_key: str, secret_key: str) -> None:
        self._binary = find_s3()
        self._directory = data_dir / "s3"
        self._ports = ports
        self._access_key, self._secret_key = access_key, secret_key
        self.config = StorageConfig(
            endpoint=f"{_ADDRESS}:{ports.s3}", access_key=access_key, secret_key=secret_key, bucket=BUCKET
        )

    def prepare(self) -> ProcessSpec:
        """Raises ProcessFailedError for data that this program cannot read."""
        make_private(self._directory)
        program = ask_program([str(self._binary), "version"], r"version \S+ (?P<version>\d+(\.\d+)*)", kind="SeaweedFS")
        claim_data(self._directory, program, remedy="Set ESPALIER_S3_BIN to a `weed` that can.")
        self._lock_doors()
        (self._directory / "mini.options").unlink(missing_ok=True)  # it would restore the ports of the last start
        remove_abandoned_sockets()
        self._remove_old_logs()
        env = {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            # SeaweedFS nearly fills half of this. Limited to that half, its garbage collection would take a tenth of a
            # core at rest and make an upload three times as expensive. Without a limit it grows to 700 MB.
            "GOMEMLIMIT": "400MiB",
            "TMPDIR": str(self._directory),
        }
        # Without -logtostderr it would also log to its own files, up to five of 1.8 GB for each level.
        argv = [str(self._binary), "-logtostderr=true", "mini", *_FLAGS, *self._listeners()]
        return ProcessSpec("s3", argv, env, death_signal=signal.SIGTERM, cwd=self._directory)

    def answers(self) -> bool:
        """Return whether it stores an object. Makes the bucket if it is missing.

        Its buckets can be listed and made a moment before its first volume accepts writes.
        """
        store = S3ObjectStore(self.config)
        try:
            store.ensure_bucket()
            store.put_bytes(_PROBE, b"ready?", content_type="text/plain")
            store.delete(_PROBE)
        except StorageError:
            return False
        return True

    def _remove_old_logs(self) -> None:
        """Remove the log files that earlier versions left."""
        for path in self._directory.glob("weed.*"):
            path.unlink()

    def _lock_doors(self) -> None:
        """Write the certificate, and the settings (SeaweedFS' security.toml) that make both ends require it."""
        certificate, key = make_certificate(_ADDRESS)
        write_private(self._directory / _CERTIFICATE, certificate)
        write_private(self._directory / _KEY, key)
        trusted, pair = f'ca = "{_CERTIFICATE}"\n', f'cert = "{_CERTIFICATE}"\nkey = "{_KEY}"\n'
        settings = (
            f"[grpc]\n{trusted}",
            *(f"[grpc.{role}]\n{pair}" for role in _GRPC_ROLES),
            *(f"[https.{door}]\n{pair}{trusted}" for door in _HTTP_DOORS),
            f"[https.client]\nenabled = true\n{pair}{trusted}",
        )
        write_private(self._directory / "security.toml", "".join(settings))

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


def remove_abandoned_sockets() -> None:
    """Remove the sockets that dead servers left in /tmp. SeaweedFS uses /tmp whatever TMPDIR says."""
    for path in Path("/tmp").glob("seaweedfs-*-grpc-*.sock"):  # noqa: S108 (see above)
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:  # another user's, or already removed
            is_young = time.time() - path.stat().st_mtime < _YOUNG_SECONDS
            if not is_young and probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()
