"""`espalier check-contract`: checks the promises on the live system, read only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table
from sqlalchemy.exc import SQLAlchemyError

from cli.environment import reading_settings
from cli.output import fail, is_json, print_json, show
from cli.owner import DEFAULT_DATA_DIR, DataDir, owner_url
from cli.reporting import describe_error
from cli.stores import find_storage
from core.db.session import DATABASE_ERRORS, auditor_transaction, connect
from core.services.promises import Finding, check_objects, check_rows
from core.services.visibility import HiddenRowsError, require_sight
from core.settings import FairnessSettings, OwnerSettings, S3Settings, StorageConfig
from core.storage import S3ObjectStore, StorageError

_CANNOT_SAY = 2


def check_contract(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    *,
    deep: Annotated[bool, typer.Option("--deep", help="Read every object and compare its sha256.")] = False,
) -> None:
    """Check the promises of docs/contract.md on the live system. Changes nothing.

    Exit code 1 when a promise is broken, 2 when it cannot be told.
    """
    url, storage = _find_servers(data_dir)
    try:
        findings = run_checks(url, storage, is_deep=deep)
    except (SQLAlchemyError, *DATABASE_ERRORS, StorageError) as error:
        fail(f"The check could not be finished: {describe_error(error)}", exit_code=_CANNOT_SAY)
    except HiddenRowsError as error:
        fail(f"The check could not begin: {error} Run `espalier migrate`.", exit_code=_CANNOT_SAY)
    if is_json():
        for finding in findings:
            print_json(finding)
    show(as_table(findings))
    if any(finding.num_broken for finding in findings):
        raise typer.Exit(1)


def run_checks(owner_url: str, storage: StorageConfig, *, is_deep: bool) -> tuple[Finding, ...]:
    """Return one finding for each promise, in their order.

    Raises SQLAlchemyError, DATABASE_ERRORS, HiddenRowsError and StorageError.
    """
    with reading_settings():
        terms = FairnessSettings().fairness_terms
    engine = connect(owner_url)
    try:
        with auditor_transaction(engine) as session:
            require_sight(session)
            rows = check_rows(session, terms)
        with auditor_transaction(engine) as session:
            objects = check_objects(session, S3ObjectStore(storage), is_deep=is_deep)
    finally:
        engine.dispose()
    return tuple(sorted((*rows, objects), key=lambda finding: int(finding.promise[1:])))


def as_table(findings: tuple[Finding, ...]) -> Table:
    table = Table("", "promise", "checked", "broken", Column("which", overflow="fold"), box=None)
    for each in findings:
        broken = f"[red]{each.num_broken}[/]" if each.num_broken else "0"
        table.add_row(each.promise, each.says, str(each.num_checked), broken, escape("\n".join(each.broken)))
    return table


def _find_servers(data_dir: Path) -> tuple[str, StorageConfig]:
    with reading_settings():
        if OwnerSettings().owner_url:
            return owner_url(data_dir, exit_code=_CANNOT_SAY), S3Settings().storage_config
    return owner_url(data_dir, exit_code=_CANNOT_SAY), find_storage(data_dir)
