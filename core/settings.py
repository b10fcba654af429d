"""Settings, read once at the edge of each process from `ESPALIER_*` variables and passed inward as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


@dataclass(frozen=True)
class StorageConfig:
    """Where the objects are. `public_endpoint` is the host that presigned URLs name, if it is another one."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str
    secure: bool = False
    public_endpoint: str | None = None


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="ESPALIER_", frozen=True, extra="ignore")


class DatabaseSettings(_Settings):
    database_url: SecretStr


class RedisSettings(_Settings):
    redis_url: SecretStr


class S3Settings(_Settings):
    s3_endpoint: str
    s3_access_key: str
    s3_secret_key: SecretStr
    s3_bucket: str = "espalier"
    s3_secure: bool = False
    s3_public_endpoint: str | None = None

    @property
    def storage_config(self) -> StorageConfig:
        return StorageConfig(
            endpoint=self.s3_endpoint,
            access_key=self.s3_access_key,
            secret_key=self.s3_secret_key.get_secret_value(),
            bucket=self.s3_bucket,
            secure=self.s3_secure,
            public_endpoint=self.s3_public_endpoint,
        )


class ApiSettings(DatabaseSettings, S3Settings):
    """`redis_url` counts requests, for rate limits; without it there are none. `requests_per_minute` is a tenant's.

    `api_processes` share the port. Each has `max_connections` at most, waits `header_seconds` for a header, and gives
    up a body, of a request or an answer, that has hardly moved in `body_seconds`.
    """

    redis_url: SecretStr | None = None
    requests_per_minute: int = Field(default=60_000, ge=1)
    max_body_bytes: int = 2 * 2**20
    api_host: str = "127.0.0.1"
    api_port: int = 8000
    api_processes: int = Field(default=1, ge=1, le=64)
    max_connections: int = Field(default=2000, ge=1)
    header_seconds: float = Field(default=10.0, gt=0)
    body_seconds: float = Field(default=30.0, gt=0)
    max_file_bytes: int = 512 * 2**20
    presign_seconds: int = Field(default=900, ge=1, le=900)


class ScheduleSettings(DatabaseSettings, RedisSettings, S3Settings):
    wake_interval_seconds: float = 1.0
    reap_interval_seconds: float = 5.0
    clean_interval_seconds: float = 60.0
    sweep_interval_seconds: float = 3600.0
    garbage_age_seconds: float = Field(default=24 * 3600.0, ge=3600)
    leader_lease_seconds: float = Field(default=6.0, gt=0)


class WorkerSettings(DatabaseSettings, RedisSettings, S3Settings):
    """`worker_pools`: the pools this worker may serve, "<base model id>@none" or "...@nf4".

    A slot's state is stored every `resume_steps` steps or `resume_seconds`, whichever comes first. `grace_seconds` is
    what a stopping worker takes at most to store its slots and give its jobs back. A worker that nobody has woken for
    `deaf_seconds`, though there is work, claims by itself.
    """

    worker_name: str = ""
    worker_pools: tuple[str, ...] = ()
    cache_dir: Path = Path(".espalier/cache")
    scratch_dir: Path | None = None
    lease_seconds: float = Field(default=60.0, gt=0)
    heartbeat_seconds: float = Field(default=5.0, gt=0)
    stall_seconds: float = Field(default=600.0, gt=0)
    resume_steps: int = Field(default=200, ge=1)
    resume_seconds: float = Field(default=60.0, gt=0)
    grace_seconds: float = Field(default=25.0, gt=0)
    storage_patience_seconds: float = Field(default=120.0, gt=0)
    deaf_seconds: float = Field(default=60.0, gt=0)
    liveness_file: Path | None = None
    trainer_start_seconds: float = Field(default=900.0, gt=0)
    trainer_threads: int | None = None
