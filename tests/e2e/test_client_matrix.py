"""The real OpenAI client, in its last versions of three majors, against the whole service with a real worker."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from core.db.models import Tenant
from core.db.session import connect
from core.domain.api_keys import ALL_SCOPES
from core.services.api_keys import issue_api_key
from core.services.tenants import create_tenant
from local.stack import LocalStack
from tests.e2e.lab import BASE_MODEL
from tests.environments import OPENAI_VERSIONS, find_client_python
from tests.sessions import any_role_transaction

MATRIX = Path(__file__).with_name("client_matrix.py")


def add_tenant(stack: LocalStack, slug: str, *, max_queued: int) -> str:
    engine = connect(stack.owner_url)
    with any_role_transaction(engine) as session:
        tenant = create_tenant(session, slug)
        session.get_one(Tenant, tenant.id).max_queued = max_queued
        api_key = issue_api_key(session, tenant.id, name="matrix", scopes=ALL_SCOPES).api_key
    engine.dispose()
    return str(api_key)


@pytest.mark.parametrize("version", OPENAI_VERSIONS)
def test_the_real_client_gets_everything_it_asks_for(stack: LocalStack, version: str) -> None:
    slug = f"v{version.replace('.', '-')}"
    keys = [add_tenant(stack, slug, max_queued=1000), add_tenant(stack, f"{slug}-full", max_queued=0)]
    argv = [str(find_client_python(version)), "-I", str(MATRIX), f"{stack.api_url}/v1", *keys, BASE_MODEL]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
