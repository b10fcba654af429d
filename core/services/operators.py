"""Operators and their keys. An operator's key opens /admin and no tenant's routes. It may be read-only."""

from __future__ import annotations

import datetime as dt
import hmac
from collections.abc import Sequence

from sqlalchemy import ColumnElement, func, select, update

from core.db.models import OperatorKey
from core.db.session import OperatorSession
from core.domain.api_keys import LAST_USED_INTERVAL, OPERATOR_PREFIX, ApiKey, OperatorIdentity, generate_api_key
from core.domain.errors import NotFoundError, UnauthenticatedError
from core.domain.ids import new_id

_IS_STALE = func.coalesce(OperatorKey.last_used_at < func.now() - LAST_USED_INTERVAL, True)


def issue_operator_key(
    session: OperatorSession, *, name: str, lifetime: dt.timedelta | None = None, is_read_only: bool = False
) -> ApiKey:
    """Add an operator key and return it with its secret, which cannot be read again later."""
    api_key = generate_api_key(OPERATOR_PREFIX)
    row = OperatorKey(
        id=new_id(),
        key_id=api_key.key_id,
        secret_hash=api_key.secret_hash,
        name=name,
        is_read_only=is_read_only,
        expires_at=None if lifetime is None else func.now() + lifetime,
    )
    session.add(row)
    session.flush()
    return api_key


def list_operator_keys(session: OperatorSession) -> Sequence[OperatorKey]:
    return session.scalars(select(OperatorKey).where(*_is_live()).order_by(OperatorKey.id)).all()


def revoke_operator_key(session: OperatorSession, key_id: str) -> None:
    revoked = session.scalar(
        update(OperatorKey)
        .where(OperatorKey.key_id == key_id, OperatorKey.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .returning(OperatorKey.id)
    )
    if revoked is None:
        raise NotFoundError(f"There is no operator key {key_id!r}.", param="key_id")


def authenticate_operator(session: OperatorSession, api_key: ApiKey) -> OperatorIdentity:
    """Return the identity of a live operator key. Unknown, wrong, revoked and expired keys get the same answer."""
    query = select(OperatorKey, _IS_STALE).where(OperatorKey.key_id == api_key.key_id, *_is_live())
    row, is_stale = session.execute(query).one_or_none() or (None, False)
    if not hmac.compare_digest(row.secret_hash if row else bytes(32), api_key.secret_hash) or row is None:
        raise UnauthenticatedError("Incorrect operator key provided: it is unknown, expired or revoked.")
    if is_stale:
        is_this = (OperatorKey.id == row.id, _IS_STALE)
        session.execute(update(OperatorKey).where(*is_this).values(last_used_at=func.now()))
    return OperatorIdentity(name=row.name, key_id=row.key_id, is_read_only=row.is_read_only)


def _is_live() -> tuple[ColumnElement[bool], ...]:
    return (OperatorKey.revoked_at.is_(None), func.coalesce(OperatorKey.expires_at > func.now(), True))
