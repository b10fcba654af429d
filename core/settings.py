"""Settings, read once at the edge of each process from `ESPALIER_*` variables and passed inward as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from core.domain import bounds
from core.domain.scheduling import MAX_LOADING_FRACTION, QUANTUM_SECONDS, TURN_SECONDS, FairnessTerms

_WEEK_SECONDS = 7 * 24 * 3600


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
    model_config = SettingsConfigDict(
        env_prefix="ESPALIER_",
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
        hide_input_in_errors=True,  # an error that one is missing would quote the others, passwords too, into the log
    )


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


class TelemetrySettings(_Settings):
    """`management_port` serves metrics and probes without a key, on loopback unless told otherwise; 0 is any free port.

    Without it there are none, and no traces without `otlp_endpoint`, the base URL of an OTLP/HTTP collector.
    """

    management_port: int | None = Field(default=None, ge=0, le=65_535)
    management_host: str = "127.0.0.1"
    otlp_endpoint: str | None = None


class FairnessSettings(_Settings):
    """How long a slot is a job's own while others wait, and how long a worker keeps its base while others wait.

    Loading bases takes at most `max_loading_fraction` of a worker's time where tenants alternate between them.
    """

    quantum_seconds: float = Field(default=QUANTUM_SECONDS, ge=0.1, le=24 * 3600)
    turn_seconds: float = Field(default=TURN_SECONDS, ge=0.1, le=24 * 3600)
    max_loading_fraction: float = Field(default=MAX_LOADING_FRACTION, ge=0.001, le=1)

    @property
    def fairness_terms(self) -> FairnessTerms:
        return FairnessTerms(self.quantum_seconds, self.turn_seconds, self.max_loading_fraction)


class ApiSettings(DatabaseSettings, S3Settings, FairnessSettings, TelemetrySettings):
    """`redis_url` counts requests, for rate limits; without it there are none. `requests_per_minute` is a tenant's.

    `api_processes` share the port. Each has `max_connections` at most, waits `header_seconds` for a header, and gives
    up a body, of a request or an answer, that has hardly moved in `body_seconds`. Stopping takes as long.
    """

    redis_url: SecretStr | None = None
    requests_per_minute: Annotated[int, bounds.REQUESTS_PER_MINUTE.field] = 60_000
    max_body_bytes: int = Field(default=2 * 2**20, ge=1024, le=64 * 2**20)
    api_host: str = "127.0.0.1"
    api_port: int = Field(default=8000, ge=0, le=65_535)
    api_processes: int = Field(default=1, ge=1, le=64)
    max_connections: int = Field(default=2000, ge=1, le=100_000)
    header_seconds: float = Field(default=10.0, ge=0.1, le=600)
    body_seconds: float = Field(default=30.0, ge=0.1, le=3600)
    max_file_bytes: Annotated[int, bounds.UPLOAD_BYTES.field] = 512 * 2**20
    presign_seconds: int = Field(default=900, ge=1, le=900)


class ScheduleSettings(DatabaseSettings, RedisSettings, S3Settings, TelemetrySettings):
    wake_interval_seconds: float = Field(default=1.0, ge=0.01, le=60)
    reap_interval_seconds: float = Field(default=5.0, ge=0.01, le=600)
    clean_interval_seconds: float = Field(default=10.0, ge=0.01, le=3600)
    sweep_interval_seconds: float = Field(default=3600.0, ge=0.01, le=_WEEK_SECONDS)
    garbage_age_seconds: float = Field(default=24 * 3600.0, ge=3600, le=_WEEK_SECONDS)
    leader_lease_seconds: float = Field(default=6.0, ge=0.1, le=3600)


class TrainerSettings(_Settings):
    """How trainers are started. `cache_dir` keeps what is made of bases, such as those converted from GGUF files."""

    cache_dir: Path = Path(".espalier/cache")
    scratch_dir: Path | None = None
    resume_steps: int = Field(default=200, ge=1, le=1_000_000)
    resume_seconds: float = Field(default=60.0, ge=0.1, le=24 * 3600)
    storage_patience_seconds: float = Field(default=120.0, ge=0.1, le=3600)
    trainer_start_seconds: float = Field(default=900.0, ge=0.1, le=24 * 3600)
    trainer_threads: int | None = Field(default=None, ge=1, le=1024)


class WorkerSettings(DatabaseSettings, RedisSettings, S3Settings, FairnessSettings, TelemetrySettings, TrainerSettings):
    """`worker_pools`: the pools this worker may serve, "<base model id>@none" or "...@nf4".

    A slot's state is stored every `resume_steps` steps or `resume_seconds`, whichever comes first. `grace_seconds` is
    what a stopping worker takes at most to store its slots and give its jobs back. A worker that nobody has woken for
    `deaf_seconds`, though there is work, claims by itself.
    """

    worker_name: str = ""
    worker_pools: tuple[str, ...] = ()
    lease_seconds: float = Field(default=60.0, ge=0.1, le=3600)
    heartbeat_seconds: float = Field(default=5.0, ge=0.01, le=600)
    stall_seconds: float = Field(default=600.0, ge=0.1, le=24 * 3600)
    grace_seconds: float = Field(default=25.0, ge=0.1, le=3600)
    deaf_seconds: float = Field(default=60.0, ge=0.1, le=3600)
