"""Tenants: who may use the service, and how much of it."""

from __future__ import annotations

import datetime as dt
import re
from typing import Annotated, Any, ClassVar

from pydantic import StringConstraints
from sqlalchemy import func, select, update

from core.db.locks import lock_for_tenant
from core.db.models import ApiKeyRow, BaseModelRow, Tenant
from core.db.session import OperatorSession
from core.domain import bounds
from core.domain.errors import ConflictError, InvalidRequestError, NotFoundError
from core.domain.ids import new_id
from core.domain.values import Frozen, Page

SLUG_PATTERN = r"[a-z0-9][a-z0-9-]{0,31}"
TenantName = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]


class TenantChange(Frozen):
    """What an operator may set for a tenant. A field that is not given stays. None means no limit, or every base."""

    LIMITS: ClassVar = (
        "weight",
        "max_running",
        "max_queued",
        "max_storage_bytes",
        "max_tokens_per_job",
        "max_gpu_seconds_per_month",
        "requests_per_minute",
    )
    name: TenantName = ""
    weight: Annotated[float, bounds.WEIGHT.field] = 1.0
    max_running: Annotated[int, bounds.RUNNING_JOBS.field] = 0
    max_queued: Annotated[int, bounds.QUEUED_JOBS.field] = 0
    max_storage_bytes: Annotated[int, bounds.STORED_BYTES.field] | None = None
    max_tokens_per_job: Annotated[int, bounds.TRAINED_TOKENS.field] | None = None
    max_gpu_seconds_per_month: Annotated[float, bounds.GPU_SECONDS.field] | None = None
    requests_per_minute: Annotated[int, bounds.REQUESTS_PER_MINUTE.field] | None = None
    allowed_base_models: tuple[str, ...] | None = None
    is_disabled: bool = False

    @property
    def given(self) -> dict[str, Any]:
        """Return the fields that were given, as columns."""
        values = self.model_dump(exclude_unset=True)
        if "allowed_base_models" in values and values["allowed_base_models"] is not None:
            values["allowed_base_models"] = sorted(values["allowed_base_models"])
        if "is_disabled" in values:
            disabled_at = func.coalesce(Tenant.disabled_at, func.now())
            values["disabled_at"] = disabled_at if values.pop("is_disabled") else None
        return values


def create_tenant(session: OperatorSession, slug: str, *, name: str | None = None) -> Tenant:
    """Add a tenant. Raises InvalidRequestError when the slug is taken or malformed."""
    if not re.fullmatch(SLUG_PATTERN, slug):
        raise InvalidRequestError(
            "A tenant's slug is 1 to 32 lower-case letters, digits and hyphens, and does not start with a hyphen.",
            param="slug",
        )
    if session.scalar(select(Tenant.id).where(Tenant.slug == slug)):
        raise InvalidRequestError(f"There is a tenant {slug!r} already.", code="tenant_exists", param="slug")
    tenant = Tenant(id=new_id(), slug=slug, name=name or slug)
    session.add(tenant)
    session.flush()
    return tenant


def find_tenant(session: OperatorSession, slug: str, *, lock: bool = False) -> Tenant:
    """Return a tenant. With `lock` it is locked until the transaction ends."""
    query = select(Tenant).where(Tenant.slug == slug)
    tenant = session.scalar(query.with_for_update(key_share=True) if lock else query)
    if tenant is None:
        raise NotFoundError(f"There is no tenant {slug!r}.", param="slug")
    return tenant


def list_tenants(session: OperatorSession, *, after: str | None, limit: int) -> Page[Tenant]:
    """Return tenants in the order of their slugs. For operators."""
    query = select(Tenant).where(Tenant.slug > after) if after is not None else select(Tenant)
    return Page.cut(session.scalars(query.order_by(Tenant.slug).limit(limit + 1)).all(), limit)


def change_tenant(session: OperatorSession, slug: str, *, change: TenantChange) -> Tenant:
    """Set the given fields.

    Raises NotFoundError for the tenant, ConflictError for a deleted one, InvalidRequestError for an unknown base.
    """
    tenant = find_tenant(session, slug, lock=True)
    require_not_deleted(tenant.deleted_at)
    known = set(session.scalars(select(BaseModelRow.id)))
    if unknown := sorted(set(change.allowed_base_models or ()) - known):
        raise InvalidRequestError(f"There is no base model {unknown[0][:200]!r}.", param="allowed_base_models")
    if change.given:
        session.execute(update(Tenant).where(Tenant.id == tenant.id).values(change.given))
        session.refresh(tenant)
    return tenant


def delete_tenant(session: OperatorSession, slug: str) -> Tenant:
    """Delete a tenant for ever. Its keys end, its slug is free, and the schedule erases its names and data.

    Raises NotFoundError, and ConflictError for a deleted tenant.
    """
    tenant = find_tenant(session, slug, lock=True)
    require_not_deleted(tenant.deleted_at)
    lock_for_tenant(session, tenant.id, purpose="api_keys")  # no key of the tenant makes another meanwhile
    live = (ApiKeyRow.tenant_id == tenant.id, ApiKeyRow.revoked_at.is_(None))
    session.execute(update(ApiKeyRow).where(*live).values(revoked_at=func.now()))
    session.execute(
        update(Tenant)
        .where(Tenant.id == tenant.id)
        .values(
            slug=f"deleted-{tenant.id.hex[-8:]}",
            name="deleted",
            disabled_at=func.coalesce(Tenant.disabled_at, func.now()),
            deleted_at=func.now(),
        )
    )
    session.execute(select(func.withdraw_permissions_of(tenant.id, slug)))
    session.refresh(tenant)
    return tenant


def require_not_deleted(deleted_at: dt.datetime | None) -> None:
    if deleted_at is not None:
        raise ConflictError("This organization is deleted, for ever.", code="tenant_deleted", param="slug")
