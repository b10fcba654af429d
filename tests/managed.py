"""Servers as a cloud provider runs them: TLS everywhere by a private CA, an owner that is no superuser, ACL users.

PostgreSQL does its own TLS and refuses connections without it. Redis and S3 are those of the local stack, each behind a
proxy that ends TLS.
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from psycopg import sql

from local.ports import free_ports
from local.privileges import drop_root
from local.processes import ChildProcess, ProcessSpec
from local.servers import LocalServers
from tests.environments import find_postgres_with_tls
from tests.faults import FaultProxy, port_of
from tests.processes import storage_settings
from tests.waiting import PATIENCE_SECONDS

HOST = "localhost"
OWNER = "service_owner"
REGION = "eu-central-1"
# What a password manager makes, and what a URL must escape.
_PASSWORD = "p@ss/w%rd:?#1"


class Authority:
    """A private CA with the files that it has signed, in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a private CA")])
        certificate = self._build(self._name, self._key).add_extension(x509.BasicConstraints(True, None), critical=True)
        self.ca_file = self._write("ca.pem", certificate.sign(self._key, hashes.SHA256()))

    def issue(self, host: str) -> tuple[Path, Path]:
        """Return the files of a certificate for a host, and of its private key."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.DNSName(host)])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        certificate = self._build(subject, key).add_extension(names, critical=False).sign(self._key, hashes.SHA256())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        key_file = self._directory / f"{host}.key"
        key_file.touch(mode=0o600)
        key_file.write_bytes(private)
        return self._write(f"{host}.pem", certificate), key_file

    def _build(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
        )

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self._directory / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


@dataclass(frozen=True)
class ManagedServers:
    """`env` leads to the servers as an operator would write it. `admin_url` is the provider's, not the customer's."""

    env: Mapping[str, str]
    admin_url: str


@contextmanager
def managed_servers(directory: Path, *, postgres_major: int) -> Iterator[ManagedServers]:
    """Run all three until the end of the block."""
    authority = Authority(directory)
    certificate = authority.issue(HOST)
    with ExitStack() as exits:
        admin_url = exits.enter_context(_running_postgres(directory, postgres_major, certificate))
        inner = exits.enter_context(LocalServers(directory / "inner", is_durable=False)).addresses
        tls_end = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls_end.load_cert_chain(*certificate)
        s3_port = int(inner.storage.endpoint.rpartition(":")[2])
        redis_door, s3_door = (
            exits.enter_context(FaultProxy(port, ssl=tls_end)) for port in (port_of(inner.redis_url), s3_port)
        )
        _make_owner(admin_url)
        _make_redis_user(inner.redis_url)
        password = quote(_PASSWORD, safe="")
        ca_file = quote(str(authority.ca_file), safe="")
        tls = f"sslmode=verify-full&sslrootcert={ca_file}"
        env = {
            "ESPALIER_OWNER_DATABASE_URL": f"postgres://{OWNER}:{password}@{HOST}:{port_of(admin_url)}/espalier?{tls}",
            "ESPALIER_REDIS_URL": f"rediss://service:{password}@{HOST}:{redis_door.port}/0?ssl_ca_certs={ca_file}",
            **storage_settings(inner.storage),
            "ESPALIER_S3_ENDPOINT": f"https://{HOST}:{s3_door.port}",
            "ESPALIER_S3_BUCKET": "managed",
            "ESPALIER_S3_REGION": REGION,
            "ESPALIER_S3_CA_BUNDLE": str(authority.ca_file),
        }
        yield ManagedServers(env, admin_url)


@contextmanager
def _running_postgres(directory: Path, major: int, certificate: tuple[Path, Path]) -> Iterator[str]:
    binaries, data_dir, password = find_postgres_with_tls(major), directory / "postgres", secrets.token_hex(16)
    data_dir.mkdir(mode=0o700)
    prefix, password_file = drop_root(data_dir), data_dir.with_suffix(".password")
    password_file.write_text(password)
    options = ["-U", "provider", "-A", "scram-sha-256", f"--pwfile={password_file}", "-E", "UTF8", "--no-sync"]
    subprocess.run([*prefix, str(binaries / "initdb"), "-D", str(data_dir), *options], check=True, capture_output=True)
    _demand_tls(data_dir, certificate)
    (port,) = free_ports(1)
    settings = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", "ssl=on"]
    argv = [str(binaries / "postgres"), "-D", str(data_dir), "-p", str(port)]
    argv += [word for setting in settings for word in ("-c", setting)]
    server = ChildProcess(ProcessSpec(f"postgres-{major}", argv, prefix=prefix), directory / "logs")
    url = f"postgresql://provider:{password}@{HOST}:{port}/postgres?sslmode=require"
    try:
        server.wait_until(lambda: _answers(url), timeout_seconds=PATIENCE_SECONDS)
        yield url
    finally:
        server.kill()


def _demand_tls(data_dir: Path, certificate: tuple[Path, Path]) -> None:
    owner = data_dir.stat()
    for source, name, mode in zip(certificate, ("server.crt", "server.key"), (0o644, 0o600), strict=True):
        target = data_dir / name
        target.write_bytes(source.read_bytes())
        target.chmod(mode)
        os.chown(target, owner.st_uid, owner.st_gid)
    (data_dir / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\nhostnossl all all all reject\n")


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


def _make_owner(admin_url: str) -> None:
    """As a provider's console does: a login that may make roles, and a database of its own."""
    with psycopg.connect(admin_url, autocommit=True) as connection:
        statement = "create role {} login createrole nosuperuser nobypassrls password {}"
        connection.execute(sql.SQL(statement).format(sql.Identifier(OWNER), sql.Literal(_PASSWORD)))
        connection.execute(sql.SQL("create database espalier owner {}").format(sql.Identifier(OWNER)))


def _make_redis_user(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.acl_setuser(
            "service", enabled=True, passwords=[f"+{_PASSWORD}"], keys="*", channels="*", categories=["+@all"]
        )
