"""API keys of tenants: issue, rotate, list, revoke and authenticate.

A secret is returned once, when its key is made. Only its hash is stored.
"""

from __future__ import annotations

import datetime as dt
import hmac
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from sqlalchemy import CTE, ColumnElement, any_, func, literal, select, update

from core.db.locks import lock_for_tenant
from core.db.models import ApiKeyRow, Tenant
from core.db.session import KeySession, OperatorSession, TenantSession, enter_tenant
from core.domain.api_keys import (
    DEFAULT_SCOPES,
    LAST_USED_INTERVAL,
    MAX_LIVE_KEYS,
    MAX_LIVE_KEYS_PER_NAME,
    ApiKey,
    Identity,
    Power,
    Scope,
    format_key_id,
    generate_api_key,
)
from core.domain.errors import ConflictError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from core.domain.ids import new_id
from core.services.tenants import require_not_deleted

# Who makes, lists and ends a tenant's keys: the tenant with a key that may, and operators.
KeyIssuer: TypeAlias = TenantSession | OperatorSession
_IS_STALE = func.coalesce(ApiKeyRow.last_used_at < func.now() - LAST_USED_INTERVAL, True)


@dataclass(frozen=True)
class IssuedKey:
    """A new API key with its secret, and its row. The secret cannot be read again later."""

    api_key: ApiKey
    row: ApiKeyRow


def issue_api_key(
    session: KeyIssuer,
    tenant_id: uuid.UUID,
    *,
    name: str,
    scopes: frozenset[Scope] | None = None,
    lifetime: dt.timedelta | None = None,
    maker_id: str | None = None,
) -> IssuedKey:
    """Add an API key of the tenant: for an operator, or for the tenant's key `maker_id`, within that key's power.

    Raises ConflictError when two keys of this name, or very many keys, are alive; PermissionDeniedError for more power
    than the maker has; UnauthenticatedError if the maker is no longer alive.
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
    session: OperatorSession, tenant_id: uuid.UUID, *, name: str, lifetime: dt.timedelta | None = None
) -> IssuedKey:
    """Add a key with the rights and the expiry of the newest key of this name, unless a new lifetime is given.

    The newest key still works. If two are alive already, the older one ends. Raises NotFoundError if there is none.
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


def list_api_keys(session: KeyIssuer, tenant_id: uuid.UUID) -> Sequence[ApiKeyRow]:
    """Return the tenant's live keys, oldest first. `MAX_LIVE_KEYS` bounds their number."""
    query = select(ApiKeyRow).where(ApiKeyRow.tenant_id == tenant_id, *_is_live())
    return session.scalars(query.order_by(ApiKeyRow.id)).all()


def get_api_key(session: KeyIssuer, tenant_id: uuid.UUID, *, key_id: str) -> ApiKeyRow:
    query = select(ApiKeyRow).where(ApiKeyRow.tenant_id == tenant_id, ApiKeyRow.key_id == key_id, *_is_live())
    row = session.scalar(query)
    if row is None:
        raise NotFoundError(f"No such API key: {format_key_id(key_id)!r}.")
    return row


def revoke_api_key(session: KeyIssuer, tenant_id: uuid.UUID, *, key_id: str, with_children: bool = False) -> None:
    """End a key. After a leak, `with_children` also ends the keys made with it, directly or indirectly.

    An ended key is refused everywhere within seconds, also on streams that it has opened.
    """
    row = get_api_key(session, tenant_id, key_id=key_id)
    ended = ApiKeyRow.id == row.id
    if with_children:
        lock_for_tenant(session, tenant_id, purpose="api_keys")  # no key of this tree makes another meanwhile
        ended = ApiKeyRow.id.in_(select(_descent(tenant_id, row.id).c.id))
    session.execute(
        update(ApiKeyRow)
        .where(ApiKeyRow.tenant_id == tenant_id, ended, ApiKeyRow.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .execution_options(synchronize_session=False)
    )


def find_key_owner(session: OperatorSession, key_id: str) -> uuid.UUID:
    """Return the tenant of a key. For operators, who may know any tenant."""
    tenant_id = session.scalar(select(ApiKeyRow.tenant_id).where(ApiKeyRow.key_id == key_id))
    if tenant_id is None:
        raise NotFoundError(f"There is no API key {key_id!r}.", param="key_id")
    return tenant_id


def authenticate(session: KeySession, api_key: ApiKey) -> Identity:
    """Return the identity of a live key. Needs a transaction opened for `api_key.key_id`.

    Unknown, wrong, revoked and expired keys get the same answer, so that an attacker learns nothing.
    """
    query = select(ApiKeyRow, _IS_STALE).where(ApiKeyRow.key_id == api_key.key_id, *_is_live())
    row, is_stale = session.execute(query).one_or_none() or (None, False)
    if not hmac.compare_digest(row.secret_hash if row else bytes(32), api_key.secret_hash) or row is None:
        raise UnauthenticatedError("Incorrect API key provided: it is unknown, expired or revoked.")
    if is_stale:
        _note_use(session, row)
    return _identity_of(session, row)


def reauthenticate(session: KeySession, key_id: str) -> Identity:
    """Return the present rights of a key that was valid before, for long requests. Raises as `authenticate` does."""
    row = _find_live_key(session, key_id)
    if row is None:
        raise UnauthenticatedError("The API key has expired or was revoked.")
    return _identity_of(session, row)


def find_reading_keys(session: TenantSession, tenant_id: uuid.UUID, key_ids: Iterable[str]) -> set[str]:
    """Return those of a tenant's keys that are alive and may read. There are none if the tenant is disabled."""
    query = (
        select(ApiKeyRow.key_id)
        .join(Tenant, Tenant.id == ApiKeyRow.tenant_id)
        .where(ApiKeyRow.tenant_id == tenant_id, ApiKeyRow.key_id.in_(key_ids), *_is_live())
        .where(literal(Scope.READ.value) == any_(ApiKeyRow.scopes), Tenant.disabled_at.is_(None))
    )
    return set(session.scalars(query))


def _add_key(session: KeyIssuer, tenant_id: uuid.UUID, *, name: str, power: Power, maker_id: str | None) -> IssuedKey:
    require_not_deleted(session.scalars(select(Tenant.deleted_at).where(Tenant.id == tenant_id)).one())
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


def _instant_after(session: KeyIssuer, lifetime: dt.timedelta | None) -> dt.datetime | None:
    """Return the expiry of a key made now, by the database's clock."""
    return None if lifetime is None else session.scalar(select(func.now() + lifetime))


def _descent(tenant_id: uuid.UUID, row_id: uuid.UUID) -> CTE:
    """Return a key and all keys made with it, directly or indirectly, also through keys that have ended."""
    own = ApiKeyRow.tenant_id == tenant_id
    family = select(ApiKeyRow.id, ApiKeyRow.key_id).where(own, ApiKeyRow.id == row_id).cte("family", recursive=True)
    children = select(ApiKeyRow.id, ApiKeyRow.key_id).where(own, ApiKeyRow.created_by == family.c.key_id)
    return family.union_all(children)


def _is_live() -> tuple[ColumnElement[bool], ...]:
    return (ApiKeyRow.revoked_at.is_(None), func.coalesce(ApiKeyRow.expires_at > func.now(), True))


def _find_live_key(session: KeySession | KeyIssuer, key_id: str) -> ApiKeyRow | None:
    return session.scalar(select(ApiKeyRow).where(ApiKeyRow.key_id == key_id, *_is_live()))


def _note_use(session: KeySession, row: ApiKeyRow) -> None:
    """Record that a key is in use, at most once in LAST_USED_INTERVAL over all processes."""
    session.execute(update(ApiKeyRow).where(ApiKeyRow.id == row.id, _IS_STALE).values(last_used_at=func.now()))


def _identity_of(session: KeySession, row: ApiKeyRow) -> Identity:
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
