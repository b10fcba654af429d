"""`espalier doctor`: checks a deployment from this host, and says what to do about each fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from pydantic_settings import BaseSettings
from sqlalchemy import Engine

from cli.doctor import database, running
from cli.doctor.devices import check_devices
from cli.doctor.findings import Finding, FindingState, failed, ok, skipped
from cli.doctor.servers import check_api, check_redis, check_storage
from cli.doctor.trial import Trial, check_job
from cli.output import is_json, print_json, say
from cli.owner import DEFAULT_DATA_DIR, DataDir, actor
from core.db.session import connect, operator_transaction, service_transaction
from core.settings import (
    SETTINGS_ERRORS,
    DatabaseSettings,
    OwnerSettings,
    RedisSettings,
    S3Settings,
    SettingFileError,
    StorageConfig,
    describe_faults,
)
from core.version import read_version
from local.external import OWNER_URL_SETTING
from local.servers import find_addresses
from local.stack import StackState

_OR_FILE = ", or name a file that holds it by the same name and _FILE"
_STYLES = {
    FindingState.OK: "green",
    FindingState.WARNING: "yellow",
    FindingState.FAILED: "red",
    FindingState.SKIPPED: "dim",
}


@dataclass(frozen=True)
class Deployment:
    """The addresses of its parts, from the settings in this environment or from the local stack of a data directory."""

    database_url: str | None
    redis_url: str | None
    storage: StorageConfig | None
    api_url: str | None
    unread: tuple[Finding, ...] = ()


def doctor(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    api_url: Annotated[str | None, typer.Option(envvar="ESPALIER_API_URL", help="Where the API answers.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="What --job trains on; one that a worker holds by default.")
    ] = None,
    patience: Annotated[float, typer.Option(min=1, help="How many seconds --job may take.")] = 900.0,
    *,
    job: Annotated[
        bool, typer.Option("--job", help="Also train a tiny adapter, as the tenant espalier-doctor.")
    ] = False,
) -> None:
    """Check a deployment from the environment this runs in. Exit code 1 when a check has failed, else 0."""
    states = []
    deployment = find_deployment(data_dir, api_url)
    for finding in run_checks(deployment, Trial(base_model, patience) if job else None):
        states.append(finding.state)
        _show(finding)
    if FindingState.FAILED in states:
        raise typer.Exit(1)


def find_deployment(data_dir: Path, api_url: str | None) -> Deployment:
    """Read each group of settings separately, so that a missing or wrong one does not hide the others."""
    database_url, redis_url, storage = None, None, None
    unread: list[Finding] = []
    with _noting(unread, "database", DatabaseSettings, f"Set {OWNER_URL_SETTING} or ESPALIER_DATABASE_URL{_OR_FILE}."):
        database_url = OwnerSettings().owner_url
        local = None if database_url else find_addresses(data_dir)
        if local is not None:
            found = api_url or StackState.read(data_dir).api_url
            return Deployment(local.postgres_url, local.redis_url, local.storage, found)
        database_url = database_url or DatabaseSettings().database_url.get_secret_value()
    with _noting(unread, "redis", RedisSettings, f"Set ESPALIER_REDIS_URL{_OR_FILE}."):
        redis_url = RedisSettings().redis_url.get_secret_value()
    with _noting(unread, "storage", S3Settings, f"Set ESPALIER_S3_ENDPOINT and its keys{_OR_FILE}."):
        storage = S3Settings().storage_config
    return Deployment(database_url, redis_url, storage, api_url, tuple(unread))


@contextmanager
def _noting(unread: list[Finding], check: str, settings: type[BaseSettings], remedy: str) -> Iterator[None]:
    """Add a finding if `settings` cannot be read. Nothing set is no fault; a wrong or incomplete setting is one."""
    try:
        yield
    except SETTINGS_ERRORS as error:
        find = skipped if _are_absent(settings, error) else failed
        unread.append(find(check, f"These settings are missing or wrong: {describe_faults(error)}", remedy=remedy))


def _are_absent(settings: type[BaseSettings], error: ValidationError | SettingFileError) -> bool:
    """Return whether the only fault is that required settings are not set."""
    if isinstance(error, SettingFileError):
        return False
    num_required = sum(field.is_required() for field in settings.model_fields.values())
    return [fault["type"] for fault in error.errors()] == ["missing"] * num_required


def run_checks(deployment: Deployment, trial: Trial | None) -> Iterator[Finding]:
    """Yield the result of each check as it comes. Checks that depend on a part that is away are left out."""
    yield ok("version", f"This is espalier {read_version()}.")
    yield from deployment.unread
    if deployment.redis_url is not None:
        yield check_redis(deployment.redis_url)
    if deployment.storage is not None:
        yield from check_storage(deployment.storage)
    yield check_devices()
    yield check_api(deployment.api_url) if deployment.api_url else skipped("api", "Give --api-url to look at the API.")
    if deployment.database_url is None:
        if trial is not None:
            yield failed("job", "A job needs a tenant, which is in the database.", remedy=f"Set {OWNER_URL_SETTING}.")
        return
    engine = connect(deployment.database_url, pool_size=1)
    try:
        yield from _check_inside(engine, deployment, trial)
    finally:
        engine.dispose()


def _check_inside(engine: Engine, deployment: Deployment, trial: Trial | None) -> Iterator[Finding]:
    found = database.check_database(engine)
    yield found
    if found.state == FindingState.FAILED:
        return
    yield from database.run_each(database.CHECKS, partial(service_transaction, engine))
    yield from database.run_each(running.CHECKS, partial(operator_transaction, engine, actor=actor()))
    if trial is None:
        return
    if deployment.api_url is None:
        yield failed("job", "A job goes through the API.", remedy="Give --api-url.")
    else:
        yield check_job(engine, deployment.api_url, trial)


def _show(finding: Finding) -> None:
    if is_json():
        print_json(finding)
        return
    says = finding.says if finding.says.endswith(".") else f"{finding.says}."
    say(f"{finding.state:<8} {finding.check:<15} {says} {finding.remedy}".rstrip(), style=_STYLES[finding.state])
