"""Tenants and their API keys. A secret is returned once, when it is made, and only its hash is kept."""

from __future__ import annotations

import hmac
import uuid
from dataclasses import dataclass

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from core.db.models import ApiKeyRow, Tenant
from core.domain.api_keys import ApiKey, generate_api_key
from core.domain.errors import InvalidRequestError, NotFoundError, UnauthenticatedError
from core.domain.ids import new_id


@dataclass(frozen=True)
class Identity:
    """Who is asking: the owner of a live API key."""

    tenant_id: uuid.UUID
    key_id: str


def create_tenant(session: Session, slug: str, *, name: str | None = None) -> Tenant:
    """Add a tenant. Raises InvalidRequestError when the slug is taken."""
    if session.scalar(select(Tenant.id).where(Tenant.slug == slug)):
        raise InvalidRequestError(f"There is a tenant {slug!r} already.", code="tenant_exists", param="slug")
    tenant = Tenant(id=new_id(), slug=slug, name=name or slug)
    session.add(tenant)
    session.flush()
    return tenant


def find_tenant(session: Session, slug: str) -> Tenant:
    tenant = session.scalar(select(Tenant).where(Tenant.slug == slug))
    if tenant is None:
        raise NotFoundError(f"There is no tenant {slug!r}.", param="slug")
    return tenant


def issue_api_key(session: Session, tenant_id: uuid.UUID, *, name: str) -> ApiKey:
    """Add an API key of the tenant and return it whole: its secret cannot be had again."""
    api_key = generate_api_key()
    row = ApiKeyRow(id=new_id(), tenant_id=tenant_id, key_id=api_key.key_id, secret_hash=api_key.secret_hash, name=name)
    session.add(row)
    session.flush()
    return api_key


def revoke_api_key(session: Session, key_id: str) -> None:
    revoked = session.scalar(
        update(ApiKeyRow)
        .where(ApiKeyRow.key_id == key_id)
        .values(revoked_at=func.coalesce(ApiKeyRow.revoked_at, func.now()))
        .returning(ApiKeyRow.id)
    )
    if revoked is None:
        raise NotFoundError(f"There is no API key {key_id!r}.", param="key_id")


def authenticate(session: Session, api_key: ApiKey) -> Identity:
    """Return whose live key this is. Needs a transaction opened for `api_key.key_id`.

    Unknown, wrong, revoked and expired keys are all answered alike, so that nothing can be learned by asking.
    """
    row = session.scalar(
        select(ApiKeyRow).where(
            ApiKeyRow.key_id == api_key.key_id,
            ApiKeyRow.revoked_at.is_(None),
            func.coalesce(ApiKeyRow.expires_at > func.now(), True),
        )
    )
    if not hmac.compare_digest(row.secret_hash if row else bytes(32), api_key.secret_hash) or row is None:
        raise UnauthenticatedError("Incorrect API key provided: it is unknown, expired or revoked.")
    return Identity(tenant_id=row.tenant_id, key_id=row.key_id)
