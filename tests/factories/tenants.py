"""Tenants, each with a key that may do everything."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from sqlalchemy import Engine

from core.domain.api_keys import ALL_SCOPES
from core.services.api_keys import issue_api_key
from core.services.tenants import create_tenant
from tests.sessions import any_role_transaction


@dataclass(frozen=True)
class Tenant:
    id: uuid.UUID
    slug: str
    api_key: str
    key_id: str


def add_tenant(owner: Engine) -> Tenant:
    slug = f"t{uuid.uuid4().hex[:12]}"
    with any_role_transaction(owner) as session:
        tenant_id = create_tenant(session, slug).id
        api_key = issue_api_key(session, tenant_id, name="test", scopes=ALL_SCOPES).api_key
    return Tenant(tenant_id, slug, str(api_key), api_key.key_id)
