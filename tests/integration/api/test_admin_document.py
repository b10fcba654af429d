"""The operators' part of the OpenAPI document, tried with generated requests.

The requests change and disable the tenants and base models that they find, so this module has its own database.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine

from core.db.session import operator_transaction
from core.services.audit import list_audit_entries
from core.services.operators import issue_operator_key
from tests.factories.bases import BASE_MODEL
from tests.integration.api.fuzzing import fuzz

CHANGES = {"tenant.created", "tenant.changed", "api_key.created", "api_key.changed", "base_model.changed"}


def test_generated_requests_of_an_operator_meet_no_server_error_and_no_undocumented_answer(
    api_url: str, owner: Engine, tmp_path: Path
) -> None:
    with operator_transaction(owner, actor="test") as session:
        operator_key = str(issue_operator_key(session, name="olga"))
    (tmp_path / "schemathesis.toml").write_text(f"[parameters]\nbase_model_id = '{BASE_MODEL}'\n")
    # Without a key there is nothing here at all, a 404, as a test of its own says.
    fuzz(api_url, operator_key, tmp_path, "--include-path-regex=^/admin/", "--exclude-checks=ignored_auth")
    with operator_transaction(owner, actor="test") as session:
        entries = list_audit_entries(session, None, before=None, limit=1000).items
    assert {entry.action for entry in entries if entry.actor.startswith("operator:olga:")} >= CHANGES, "not let in"
