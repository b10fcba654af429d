"""Tenants and their API keys. A secret is returned once, when it is made, and only its hash is kept."""

from __future__ import annotations

import datetime as dt
import hmac
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import StringConstraints
from sqlalchemy import CTE, ColumnElement, any_, func, literal, select, update
from sqlalchemy.orm import Session

from core.db.locks import lock_for_tenant
from core.db.models import ApiKeyRow, BaseModelRow, Tenant
from core.db.session import enter_tenant
from core.domain import bounds
from core.domain.api_keys import (
    DEFAULT_SCOPES,
    MAX_LIVE_KEYS,
    MAX_LIVE_KEYS_PER_NAME,
    ApiKey,
    Power,
    Scope,
    format_key_id,
    generate_api_key,
)
from core.domain.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from core.domain.ids import new_id
from core.domain.training import Frozen
from core.domain.values import Page

SLUG_PATTERN = r"[a-z0-9][a-z0-9-]{0,31}"
TenantName = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
# How exact `last_used_at` is, and so how seldom using a key writes.
LAST_USED_INTERVAL = dt.timedelta(minutes=1)


@dataclass(frozen=True)
class Identity:
    """Who is asking: the owner of a live API key."""

    tenant_id: uuid.UUID
    key_id: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None = None
    expires_at: dt.datetime | None = None

    @property
    def actor(self) -> str:
        """Return the name under which the audit log knows this key."""
        return f"key:{self.key_id}"

    def limit_lifetime(self, lifetime: dt.timedelta, *, now: dt.datetime) -> dt.timedelta:
        """Return how long what is handed out now may open doors by itself: no longer than the key does."""
        if self.expires_at is None:
            return lifetime
        return max(min(lifetime, self.expires_at - now), dt.timedelta(seconds=1))


@dataclass(frozen=True)
class IssuedKey:
    """A fresh API key, whole, and its row. Nobody gets to see the secret again."""

    api_key: ApiKey
    row: ApiKeyRow


class TenantChange(Frozen):
    """What an operator may set of a tenant. A field that is not given stays; None is no limit, or every base."""

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


def create_tenant(session: Session, slug: str, *, name: str | None = None) -> Tenant:
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


def find_tenant(session: Session, slug: str, *, lock: bool = False) -> Tenant:
    """Return a tenant; with `lock`, as it stands once nobody else changes it, until the transaction ends."""
    query = select(Tenant).where(Tenant.slug == slug)
    tenant = session.scalar(query.with_for_update(key_share=True) if lock else query)
    if tenant is None:
        raise NotFoundError(f"There is no tenant {slug!r}.", param="slug")
    return tenant


def list_tenants(session: Session, *, after: str | None, limit: int) -> Page[Tenant]:
    """Return tenants in the order of their slugs. For operators."""
    query = select(Tenant).where(Tenant.slug > after) if after is not None else select(Tenant)
    return Page.cut(session.scalars(query.order_by(Tenant.slug).limit(limit + 1)).all(), limit)


def change_tenant(session: Session, slug: str, *, change: TenantChange) -> Tenant:
    """Set what is given.

    Raises NotFoundError for the tenant, ConflictError for one that is deleted, InvalidRequestError for a base nobody
    knows.
    """
    tenant = find_tenant(session, slug, lock=True)
    _require_not_deleted(tenant.deleted_at)
    known = set(session.scalars(select(BaseModelRow.id)))
    if unknown := sorted(set(change.allowed_base_models or ()) - known):
        raise InvalidRequestError(f"There is no base model {unknown[0][:200]!r}.", param="allowed_base_models")
    if change.given:
        session.execute(update(Tenant).where(Tenant.id == tenant.id).values(change.given))
        session.refresh(tenant)
    return tenant


def delete_tenant(session: Session, slug: str) -> Tenant:
    """Delete a tenant for ever: its keys end, its names go, and the schedule erases what it has. Its slug is free.

    Raises NotFoundError, and ConflictError for one that is deleted.
    """
    tenant = find_tenant(session, slug, lock=True)
    _require_not_deleted(tenant.deleted_at)
    lock_for_tenant(session, tenant.id, purpose="api_keys")  # none of its keys makes another meanwhile
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


def _require_not_deleted(deleted_at: dt.datetime | None) -> None:
    if deleted_at is not None:
        raise ConflictError("This organization is deleted, for ever.", code="tenant_deleted", param="slug")


def issue_api_key(
    session: Session,
    tenant_id: uuid.UUID,
    *,
    name: str,
    scopes: frozenset[Scope] | None = None,
    lifetime: dt.timedelta | None = None,
    maker_id: str | None = None,
) -> IssuedKey:
    """Add an API key of the tenant, which an operator makes, or its key `maker_id` within that key's own power.

    Raises ConflictError when two keys of this name, or very many, are alive; PermissionDeniedError for more power than
    the maker has; UnauthenticatedError for a maker that is dead.
    """
    lock_for_tenant(session, tenant_id, purpose="api_keys")
    expires_at = _instant_after(session, lifetime)
    power = Power(scopes or DEFAULT_SCOPES, expires_at)
    if maker_id is not None:
        maker = _find_live_key(session, maker_id)
        if maker is None:
            raise UnauthenticatedError("The API key has expired or was revoked.")
        power = _power_of(maker).hand_down(scopes=scopes, expires_at=expires_at)
    return _add_key(session, tenant_id, name=name, power=power, maker_id=maker_id)


def rotate_api_key(
    session: Session, tenant_id: uuid.UUID, *, name: str, lifetime: dt.timedelta | None = None
) -> IssuedKey:
    """Add a key that is what the newest of this name is, to the day of its expiry unless a new lifetime is given.

    The newest goes on working; where two are alive already, the older one ends. Raises NotFoundError where none is.
    """
    lock_for_tenant(session, tenant_id, purpose="api_keys")
    same_name = [row for row in list_api_keys(session, tenant_id) if row.name == name]
    if not same_name:
        raise NotFoundError(f"There is no live key named {name!r}.", param="name")
    for row in same_name[: 1 - MAX_LIVE_KEYS_PER_NAME]:
        revoke_api_key(session, tenant_id, key_id=row.key_id)
    newest = same_name[-1]
    power = _power_of(newest)
    if lifetime is not None:
        power = Power(power.scopes, _instant_after(session, lifetime))
    return _add_key(session, tenant_id, name=name, power=power, maker_id=newest.created_by)


def _add_key(session: Session, tenant_id: uuid.UUID, *, name: str, power: Power, maker_id: str | None) -> IssuedKey:
    _require_not_deleted(session.scalars(select(Tenant.deleted_at).where(Tenant.id == tenant_id)).one())
    live = list_api_keys(session, tenant_id)
    if sum(row.name == name for row in live) >= MAX_LIVE_KEYS_PER_NAME or len(live) >= MAX_LIVE_KEYS:
        raise ConflictError(
            f"At most {MAX_LIVE_KEYS_PER_NAME} keys of one name may be alive, and {MAX_LIVE_KEYS} in all. "
            f"Revoke one, or choose another name than {name!r}.",
            code="too_many_live_keys",
            param="name",
        )
    api_key = generate_api_key()
    row = ApiKeyRow(
        id=new_id(),
        tenant_id=tenant_id,
        key_id=api_key.key_id,
        secret_hash=api_key.secret_hash,
        name=name,
        scopes=sorted(power.scopes),
        expires_at=power.expires_at,
        created_by=maker_id,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return IssuedKey(api_key, row)


def _power_of(row: ApiKeyRow) -> Power:
    return Power(frozenset(map(Scope, row.scopes)), row.expires_at)


def _instant_after(session: Session, lifetime: dt.timedelta | None) -> dt.datetime | None:
    """Return when what is made now is over, by the database's clock."""
    return None if lifetime is None else session.scalar(select(func.now() + lifetime))


def list_api_keys(session: Session, tenant_id: uuid.UUID) -> Sequence[ApiKeyRow]:
    """Return the tenant's live keys, oldest first. They are few by `MAX_LIVE_KEYS`."""
    query = select(ApiKeyRow).where(ApiKeyRow.tenant_id == tenant_id, *_is_live())
    return session.scalars(query.order_by(ApiKeyRow.id)).all()


def get_api_key(session: Session, tenant_id: uuid.UUID, *, key_id: str) -> ApiKeyRow:
    query = select(ApiKeyRow).where(ApiKeyRow.tenant_id == tenant_id, ApiKeyRow.key_id == key_id, *_is_live())
    row = session.scalar(query)
    if row is None:
        raise NotFoundError(f"No such API key: {format_key_id(key_id)!r}.")
    return row


def revoke_api_key(session: Session, tenant_id: uuid.UUID, *, key_id: str, with_children: bool = False) -> None:
    """End a key, and with it those that it made, and theirs, if asked: for a key that has leaked.

    What is ended is refused everywhere within seconds, also on streams that it has opened.
    """
    row = get_api_key(session, tenant_id, key_id=key_id)
    ended = ApiKeyRow.id == row.id
    if with_children:
        lock_for_tenant(session, tenant_id, purpose="api_keys")  # none of them makes another meanwhile
        ended = ApiKeyRow.id.in_(select(_descent(tenant_id, row.id).c.id))
    session.execute(
        update(ApiKeyRow)
        .where(ApiKeyRow.tenant_id == tenant_id, ended, ApiKeyRow.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .execution_options(synchronize_session=False)
    )


def _descent(tenant_id: uuid.UUID, row_id: uuid.UUID) -> CTE:
    """Return a key and all that came of it, also through keys that are dead."""
    own = ApiKeyRow.tenant_id == tenant_id
    family = select(ApiKeyRow.id, ApiKeyRow.key_id).where(own, ApiKeyRow.id == row_id).cte("family", recursive=True)
    children = select(ApiKeyRow.id, ApiKeyRow.key_id).where(own, ApiKeyRow.created_by == family.c.key_id)
    return family.union_all(children)


def find_key_owner(session: Session, key_id: str) -> uuid.UUID:
    """Return the tenant of a key. For operators, who may know any tenant."""
    tenant_id = session.scalar(select(ApiKeyRow.tenant_id).where(ApiKeyRow.key_id == key_id))
    if tenant_id is None:
        raise NotFoundError(f"There is no API key {key_id!r}.", param="key_id")
    return tenant_id


def authenticate(session: Session, api_key: ApiKey) -> Identity:
    """Return whose live key this is. Needs a transaction opened for `api_key.key_id`.

    Unknown, wrong, revoked and expired keys are all answered alike, so that nothing can be learned by asking.
    """
    row = _find_live_key(session, api_key.key_id)
    if not hmac.compare_digest(row.secret_hash if row else bytes(32), api_key.secret_hash) or row is None:
        raise UnauthenticatedError("Incorrect API key provided: it is unknown, expired or revoked.")
    _note_use(session, row)
    return _identity_of(session, row)


def reauthenticate(session: Session, key_id: str) -> Identity:
    """Return what a key that was good may do now: for a request that lasts. Raises as `authenticate` does."""
    row = _find_live_key(session, key_id)
    if row is None:
        raise UnauthenticatedError("The API key has expired or was revoked.")
    return _identity_of(session, row)


def find_reading_keys(session: Session, tenant_id: uuid.UUID, key_ids: Iterable[str]) -> set[str]:
    """Return those of a tenant's keys that are alive and may read; none where the tenant is disabled."""
    query = (
        select(ApiKeyRow.key_id)
        .join(Tenant, Tenant.id == ApiKeyRow.tenant_id)
        .where(ApiKeyRow.tenant_id == tenant_id, ApiKeyRow.key_id.in_(key_ids), *_is_live())
        .where(literal(Scope.READ.value) == any_(ApiKeyRow.scopes), Tenant.disabled_at.is_(None))
    )
    return set(session.scalars(query))


def _is_live() -> tuple[ColumnElement[bool], ...]:
    return (ApiKeyRow.revoked_at.is_(None), func.coalesce(ApiKeyRow.expires_at > func.now(), True))


def _find_live_key(session: Session, key_id: str) -> ApiKeyRow | None:
    return session.scalar(select(ApiKeyRow).where(ApiKeyRow.key_id == key_id, *_is_live()))


def _note_use(session: Session, row: ApiKeyRow) -> None:
    """Write down that a key is in use, at most once in LAST_USED_INTERVAL however many processes see it."""
    is_stale = func.coalesce(ApiKeyRow.last_used_at < func.now() - LAST_USED_INTERVAL, True)
    if row.last_used_at is None or dt.datetime.now(dt.UTC) - row.last_used_at >= LAST_USED_INTERVAL:
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == row.id, is_stale).values(last_used_at=func.now()))


def _identity_of(session: Session, row: ApiKeyRow) -> Identity:
    enter_tenant(session, row.tenant_id)
    tenant = session.scalars(select(Tenant).where(Tenant.id == row.tenant_id)).one()
    if tenant.disabled_at is not None:
        raise PermissionDeniedError("This organization is disabled. Ask the operator.", code="organization_disabled")
    return Identity(
        tenant_id=row.tenant_id,
        key_id=row.key_id,
        scopes=frozenset(map(Scope, row.scopes)),
        requests_per_minute=tenant.requests_per_minute,
        expires_at=row.expires_at,
    )
