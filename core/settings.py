"""Settings, read once at the start of each process from `ESPALIER_*` variables, and passed on as values.

Every setting may also come from a file: `ESPALIER_X_FILE` names a file that contains the value of `ESPALIER_X`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from core.database_urls import read_url
from core.domain import bounds
from core.domain.scheduling import MAX_LOADING_FRACTION, QUANTUM_SECONDS, TURN_SECONDS, FairnessTerms
from core.redis_urls import check_files, read_redis_url
from core.s3_endpoints import check_bucket_name, read_endpoint

_WEEK_SECONDS = 7 * 24 * 3600
_MAX_DAYS = 36_500
_PREFIX = "ESPALIER_"
FILE_SUFFIX = "_FILE"


Addressing = Literal["auto", "path", "virtual"]


@dataclass(frozen=True)
class StorageConfig:
    """Where the objects are: hosts with ports, reached by https if `secure`.

    `public_endpoint` is the host in presigned URLs, if it is another one. Without keys, the credentials of the
    environment or of the machine are used. `ca_bundle` is the file of the trusted authorities; without it the system's
    are used. With `addressing` "virtual" the bucket is part of the host's name; "auto" follows the host.
    """

    endpoint: str
    access_key: str | None
    secret_key: str | None = field(repr=False)
    bucket: str
    secure: bool = False
    public_endpoint: str | None = None
    is_public_secure: bool = False
    region: str | None = None
    addressing: Addressing = "auto"
    ca_bundle: str | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.endpoint}"


class SettingFileError(Exception):
    """A file that a setting names cannot be used. The message names the variable, never the content."""


class _FileSource(PydanticBaseSettingsSource):
    """Reads settings from the files that variables with the suffix `_FILE` name, without surrounding white space.

    An empty variable counts as not set, because compose files pass on unset variables as empty ones.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return _read_setting_file(variable_of(field_name)), field_name, self.field_is_complex(field)

    def __call__(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, described in self.settings_cls.model_fields.items():
            value, key, is_complex = self.get_field_value(described, name)
            if value is not None:
                found[key] = self.prepare_field_value(name, described, value, is_complex)
        return found


def variable_of(setting: str) -> str:
    """Return the environment variable of a setting."""
    return f"{_PREFIX}{setting.upper()}"


SETTINGS_ERRORS = (ValidationError, SettingFileError)


def describe_faults(error: ValidationError | SettingFileError) -> str:
    """Return which variables are missing or wrong, and why, without any value."""
    if isinstance(error, SettingFileError):
        return str(error)
    return ", ".join(f"{variable_of(str(fault['loc'][0]))} ({fault['msg']})" for fault in error.errors())


def _read_setting_file(variable: str) -> str | None:
    path = os.environ.get(variable + FILE_SUFFIX)
    if not path:
        return None
    if os.environ.get(variable):
        raise SettingFileError(f"{variable} and {variable}{FILE_SUFFIX} are both set: keep one of them.")
    try:
        value = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingFileError(f"{variable}{FILE_SUFFIX} names {path}, which cannot be read: {reason}.") from None
    if not value:
        raise SettingFileError(f"{variable}{FILE_SUFFIX} names {path}, which is empty.")
    return value


class _Settings(BaseSettings):
    # When one setting is missing, the error must not print the others, which include secrets, into the log.
    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_ignore_empty=True,  # compose files pass on unset variables as empty ones
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        return (init_settings, _FileSource(settings_cls), env_settings)


class BuildSettings(_Settings):
    """The commit that an image was built from."""

    commit: str = ""


def _check_database_url(url: SecretStr) -> SecretStr:
    read_url(url.get_secret_value())
    return url


def _check_redis_url(url: SecretStr) -> SecretStr:
    check_files(read_redis_url(url.get_secret_value()))
    return url


DatabaseUrl = Annotated[SecretStr, AfterValidator(_check_database_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_check_redis_url)]


class DatabaseSettings(_Settings):
    database_url: DatabaseUrl


class OwnerSettings(_Settings):
    """The settings of operators' commands: the URL of the tables' owner."""

    owner_database_url: DatabaseUrl | None = None

    @property
    def owner_url(self) -> str | None:
        return self.owner_database_url.get_secret_value() if self.owner_database_url else None


class LoginSettings(_Settings):
    """The passwords that `espalier migrate` gives to the runtime roles."""

    api_password: SecretStr | None = None
    scaler_password: SecretStr | None = None
    schedule_password: SecretStr | None = None
    worker_password: SecretStr | None = None

    @property
    def passwords(self) -> dict[str, str]:
        """The passwords that are set, by the name of the role."""
        named = {f"espalier_{name.removesuffix('_password')}": secret for name, secret in self if secret}
        return {role: secret.get_secret_value() for role, secret in named.items() if secret.get_secret_value()}


class RedisSettings(_Settings):
    redis_url: RedisUrl


def _check_endpoint(value: str) -> str:
    read_endpoint(value)
    return value


EndpointUrl = Annotated[str, AfterValidator(_check_endpoint)]
BucketName = Annotated[str, AfterValidator(check_bucket_name)]


class S3Settings(_Settings):
    """Endpoints are URLs, or hosts; for hosts `s3_secure` says whether they are reached by https.

    Without keys the credentials come from the environment (`AWS_ACCESS_KEY_ID` ...), from a web identity
    (`AWS_WEB_IDENTITY_TOKEN_FILE`, `AWS_ROLE_ARN`), or from the role of the container or the machine.
    """

    s3_endpoint: EndpointUrl
    s3_public_endpoint: EndpointUrl | None = None
    s3_secure: bool | None = None
    s3_access_key: str | None = None
    s3_secret_key: SecretStr | None = Field(default=None, validate_default=True)
    s3_bucket: BucketName = "espalier"
    s3_region: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    s3_addressing: Addressing = "auto"
    s3_ca_bundle: FilePath | None = None

    @field_validator("s3_secure")
    @classmethod
    def _check_secure(cls, value: bool | None, info: ValidationInfo) -> bool | None:  # noqa: FBT001 (pydantic's call)
        said = read_endpoint(info.data["s3_endpoint"]).secure if "s3_endpoint" in info.data else None
        if value is not None and said is not None and value != said:
            raise ValueError("The URL of the endpoint says otherwise: leave this out.")
        return value

    @field_validator("s3_secret_key")
    @classmethod
    def _check_keys(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if "s3_access_key" in info.data and (value is None) != (info.data["s3_access_key"] is None):
            both = f"{variable_of('s3_access_key')} and {variable_of('s3_secret_key')}"
            raise ValueError(f"{both} are set together, or neither is.")
        return value

    @property
    def storage_config(self) -> StorageConfig:
        endpoint = read_endpoint(self.s3_endpoint)
        public = read_endpoint(self.s3_public_endpoint) if self.s3_public_endpoint else None
        secure = bool(self.s3_secure if endpoint.secure is None else endpoint.secure)
        return StorageConfig(
            endpoint=endpoint.host,
            access_key=self.s3_access_key,
            secret_key=self.s3_secret_key.get_secret_value() if self.s3_secret_key else None,
            bucket=self.s3_bucket,
            secure=secure,
            public_endpoint=public.host if public else None,
            is_public_secure=secure if public is None or public.secure is None else public.secure,
            region=self.s3_region,
            addressing=self.s3_addressing,
            ca_bundle=str(self.s3_ca_bundle) if self.s3_ca_bundle else None,
        )


class TelemetrySettings(_Settings):
    """`management_port` serves metrics and probes without a key, on loopback by default. 0 picks any free port.

    Without this setting there are no metrics and no probes. Without `otlp_endpoint`, the base URL of an OTLP/HTTP
    collector, there are no traces.
    """

    management_port: int | None = Field(default=None, ge=0, le=65_535)
    management_host: str = "127.0.0.1"
    otlp_endpoint: str | None = None


class FairnessSettings(_Settings):
    """For how long, while others wait, a job may keep its slot and a worker may keep its base.

    Loading bases takes at most `max_loading_fraction` of a worker's time when tenants alternate between bases.
    """

    quantum_seconds: float = Field(default=QUANTUM_SECONDS, ge=0.1, le=24 * 3600)
    turn_seconds: float = Field(default=TURN_SECONDS, ge=0.1, le=24 * 3600)
    max_loading_fraction: float = Field(default=MAX_LOADING_FRACTION, ge=0.001, le=1)

    @property
    def fairness_terms(self) -> FairnessTerms:
        return FairnessTerms(self.quantum_seconds, self.turn_seconds, self.max_loading_fraction)


class ApiSettings(DatabaseSettings, S3Settings, FairnessSettings, TelemetrySettings):
    """Settings of the API. Without `redis_url` there are no rate limits. `requests_per_minute` is for each tenant.

    `api_processes` share the port. Each has at most `max_connections`, waits `header_seconds` for a header, and gives
    up a body, of a request or an answer, that has hardly moved in `body_seconds`. Stopping takes as long. `root_path`
    is what comes before the API's own paths if a proxy serves it below a path, such as `/espalier`.
    """

    redis_url: RedisUrl | None = None
    requests_per_minute: Annotated[int, bounds.REQUESTS_PER_MINUTE.field] = 60_000
    max_body_bytes: int = Field(default=2 * 2**20, ge=1024, le=64 * 2**20)
    api_host: str = "127.0.0.1"
    root_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    api_port: int = Field(default=8000, ge=0, le=65_535)
    api_processes: int = Field(default=1, ge=1, le=64)
    max_connections: int = Field(default=2000, ge=1, le=100_000)
    header_seconds: float = Field(default=10.0, ge=0.1, le=600)
    body_seconds: float = Field(default=30.0, ge=0.1, le=3600)
    max_file_bytes: Annotated[int, bounds.UPLOAD_BYTES.field] = 512 * 2**20
    presign_seconds: int = Field(default=900, ge=1, le=900)


class ScheduleSettings(DatabaseSettings, RedisSettings, S3Settings, TelemetrySettings):
    """`keep_..._days` counts from the end of a job, and in the audit log from the entry. 0 keeps for ever."""

    wake_interval_seconds: float = Field(default=1.0, ge=0.01, le=60)
    reap_interval_seconds: float = Field(default=5.0, ge=0.01, le=600)
    clean_interval_seconds: float = Field(default=10.0, ge=0.01, le=3600)
    sweep_interval_seconds: float = Field(default=3600.0, ge=0.01, le=_WEEK_SECONDS)
    garbage_age_seconds: float = Field(default=24 * 3600.0, ge=3600, le=_WEEK_SECONDS)
    forget_interval_seconds: float = Field(default=600.0, ge=0.01, le=_WEEK_SECONDS)
    keep_log_lines_days: int = Field(default=90, ge=0, le=_MAX_DAYS)
    keep_events_days: int = Field(default=365, ge=0, le=_MAX_DAYS)
    keep_metrics_days: int = Field(default=365, ge=0, le=_MAX_DAYS)
    keep_checkpoints_days: int = Field(default=0, ge=0, le=_MAX_DAYS)
    keep_jobs_days: int = Field(default=730, ge=0, le=_MAX_DAYS)
    keep_audit_days: int = Field(default=1095, ge=0, le=_MAX_DAYS)
    leader_lease_seconds: float = Field(default=6.0, ge=0.1, le=3600)


class TrainerSettings(_Settings):
    """How trainers are started. `cache_dir` stores files made from bases, such as those converted from GGUF."""

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
    the longest that a stopping worker takes to store its slots and give its jobs back. A worker that received no
    wake-up for `deaf_seconds`, though there is work, claims by itself. One that has held no job for `idle_exit_seconds`
    ends with status 0; None means never.
    """

    worker_name: str = ""
    worker_pools: tuple[str, ...] = ()
    lease_seconds: float = Field(default=60.0, ge=0.1, le=3600)
    heartbeat_seconds: float = Field(default=5.0, ge=0.01, le=600)
    stall_seconds: float = Field(default=600.0, ge=0.1, le=24 * 3600)
    grace_seconds: float = Field(default=25.0, ge=0.1, le=3600)
    deaf_seconds: float = Field(default=60.0, ge=0.1, le=3600)
    idle_exit_seconds: float | None = Field(default=None, ge=0.1, le=_WEEK_SECONDS)
