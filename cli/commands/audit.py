"""`espalier audit`: who changed what."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.output import fields_of, print_rows
from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session
from cli.tables import Column
from core.services import audit as changes
from core.services import tenants as services


def audit(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000)] = 50,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Show who changed what, newest first."""
    with operator_session(data_dir) as session:
        tenant_id = services.find_tenant(session, tenant).id if tenant else None
        rows = changes.list_audit_entries(session, tenant_id, before=None, limit=limit).items
    names = ("created_at", "actor", "action", "subject", "before", "after")
    columns = ("created_at", "actor", Column("action", is_whole=True), "subject", "before", "after")
    print_rows(columns, (fields_of(row, names) for row in rows))
