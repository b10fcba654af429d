"""The OpenAPI document describes the service: it equals the stored file, and generated requests confirm it."""

from __future__ import annotations

from pathlib import Path

from api.openapi import render_document
from tests.factories.tenants import Tenant
from tests.integration.api.fuzzing import fuzz

ROOT = Path(__file__).resolve().parents[3]


def test_the_committed_document_is_the_services_own() -> None:
    assert (ROOT / "openapi.json").read_text() == render_document(), "run `make openapi` and look at the difference"


def test_generated_requests_meet_no_server_error_and_no_undocumented_answer(
    api_url: str, tenant: Tenant, tmp_path: Path
) -> None:
    # Graders answer 501 and nothing else, as their own test says; operators' requests have a database of their own.
    fuzz(api_url, tenant.api_key, tmp_path, "--exclude-path-regex=/graders/")
