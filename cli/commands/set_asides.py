"""`espalier set-asides`: rows on which a duty of the service failed, and why."""

from __future__ import annotations

from cli.output import fields_of, print_rows
from cli.owner import DEFAULT_DATA_DIR, DataDir, operator_session
from cli.tables import Column
from core.services.set_asides import list_set_asides


def set_asides(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show what could not be claimed, expired, purged, swept or settled, why, and when it is tried again."""
    with operator_session(data_dir) as session:
        rows = list_set_asides(session)
    names = ("duty", "row_id", "tenant_id", "reason", "num_failures", "created_at", "retry_at")
    columns = ("duty", Column("row_id", is_whole=True), "reason", Column("num_failures", "failures"), "retry_at")
    print_rows(columns, (fields_of(row, names) for row in rows))
