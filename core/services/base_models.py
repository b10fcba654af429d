"""Base models: which of them a tenant may train on, and what workers and operators found when they loaded them."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from typing import TypeAlias

from sqlalchemy import ColumnElement, and_, any_, func, not_, or_, select, true, update
from sqlalchemy.dialects.postgresql import insert

from core.db.models import BaseModelRow, BaseTokenizer, Tenant, Worker
from core.db.session import OperatorSession, OwnerSession, ServiceSession, TenantSession
from core.domain.bases import BaseState
from core.domain.errors import ConflictError, NotFoundError

# Who sees every base model. A tenant sees those that it may use.
BaseReader: TypeAlias = OperatorSession | OwnerSession | ServiceSession
# Who loads a base and says what it found: a worker, and the owner's `espalier base-models check`.
BaseLoader: TypeAlias = OwnerSession | ServiceSession


def record_state(
    session: BaseLoader, base_model_id: str, *, state: BaseState, reason: str | None, by: str
) -> dt.datetime | None:
    """Record what an attempt to load a base has found. Return since when its row has its present state.

    "unusable" is not accepted while another live worker holds the base, or has found it usable. Then the fault is the
    finder's own, such as a disk that is not mounted there.
    """
    is_news = or_(BaseModelRow.state != state, BaseModelRow.state_reason.is_distinct_from(reason))
    is_believed = true() if state != BaseState.UNUSABLE else not_(_has_witness(by))
    session.execute(
        update(BaseModelRow)
        .where(BaseModelRow.id == base_model_id, is_news, is_believed)
        .values(state=state, state_reason=reason, state_since=func.clock_timestamp(), checked_by=by)
        .execution_options(synchronize_session=False)
    )
    return session.scalar(select(BaseModelRow.state_since).where(BaseModelRow.id == base_model_id))


def _has_witness(by: str) -> ColumnElement[bool]:
    is_other = and_(Worker.name != by, Worker.alive_until > func.now())
    found_it_well = and_(Worker.name == BaseModelRow.checked_by, BaseModelRow.state != BaseState.UNUSABLE)
    holds_it = and_(func.split_part(Worker.pool, "@", 1) == BaseModelRow.id, Worker.state.in_(("idle", "serving")))
    return select(Worker.name).where(is_other, or_(found_it_well, holds_it)).correlate(BaseModelRow).exists()


def check_is_usable(row: BaseModelRow) -> None:
    """Raise ConflictError for a base that no worker can load: a job on it would wait for its operator."""
    if row.state == BaseState.UNUSABLE:
        raise ConflictError(
            f"The base model {row.id!r} cannot be trained on at the moment. The operator has to mend it.",
            code="base_model_unusable",
            param="model",
        )


def record_tokenizer(session: ServiceSession, base_model_id: str, *, object_key: str) -> None:
    """Record where the worker that loaded a base last has stored its tokenizer."""
    values = {"base_model_id": base_model_id, "object_key": object_key, "published_at": func.now()}
    session.execute(
        insert(BaseTokenizer).values(values).on_conflict_do_update(index_elements=["base_model_id"], set_=values)
    )


def find_tokenizer(session: TenantSession, base_model_id: str) -> str:
    """Return the object key of a base's tokenizer. Raises ConflictError before any worker has loaded the base."""
    query = select(BaseTokenizer.object_key).where(BaseTokenizer.base_model_id == base_model_id)
    object_key = session.scalar(query)
    if object_key is None:
        raise ConflictError(
            f"No worker has loaded {base_model_id!r} yet, so its tokenizer is not known here. Try again once one has.",
            code="tokenizer_unknown",
            param="model",
        )
    return object_key


def list_base_models(session: BaseReader) -> Sequence[BaseModelRow]:
    """Return every base that is served, whichever tenants may use it."""
    return session.scalars(select(BaseModelRow).where(_is_served()).order_by(BaseModelRow.id)).all()


def list_known_base_models(session: BaseReader) -> Sequence[BaseModelRow]:
    """Return every base that was ever in the registry. For operators."""
    return session.scalars(select(BaseModelRow).order_by(BaseModelRow.id)).all()


def get_known_base_model(session: BaseReader, base_model_id: str) -> BaseModelRow:
    """Return a base that was ever in the registry. For operators."""
    row = session.get(BaseModelRow, base_model_id)
    if row is None:
        raise NotFoundError(f"There is no base model {base_model_id[:200]!r}.", code="model_not_found")
    return row


def switch_base_model(session: OperatorSession, base_model_id: str, *, is_disabled: bool) -> BaseModelRow:
    """Allow or forbid a base, whatever the registry says. Submitted jobs continue."""
    row = get_known_base_model(session, base_model_id)
    session.execute(
        update(BaseModelRow)
        .where(BaseModelRow.id == base_model_id)
        .values(disabled_at=func.coalesce(BaseModelRow.disabled_at, func.now()) if is_disabled else None)
    )
    session.refresh(row)
    return row


def list_allowed_base_models(session: TenantSession, tenant_id: uuid.UUID) -> Sequence[BaseModelRow]:
    """Return the bases that the tenant may train on."""
    query = select(BaseModelRow).where(is_usable_by(tenant_id))
    return session.scalars(query.order_by(BaseModelRow.id)).all()


def get_base_model(session: TenantSession, tenant_id: uuid.UUID, *, base_model_id: str) -> BaseModelRow:
    """Return a base that the tenant may use. Any other base does not exist for the tenant."""
    query = select(BaseModelRow).where(BaseModelRow.id == base_model_id, is_usable_by(tenant_id))
    row = session.scalar(query)
    if row is None:
        known = ", ".join(base.id for base in list_allowed_base_models(session, tenant_id)) or "none"
        raise NotFoundError(
            f"The model {base_model_id[:200]!r} does not exist. Base models here: {known}.",
            code="model_not_found",
            param="model",
        )
    return row


def is_usable_by(tenant_id: uuid.UUID | ColumnElement[uuid.UUID]) -> ColumnElement[bool]:
    """Return the condition that a base is served, and the tenant may use it."""
    allowed = or_(Tenant.allowed_base_models.is_(None), BaseModelRow.id == any_(Tenant.allowed_base_models))
    is_allowed = select(Tenant.id).where(Tenant.id == tenant_id, allowed).correlate(BaseModelRow).exists()
    return and_(_is_served(), is_allowed)


def _is_served() -> ColumnElement[bool]:
    return and_(BaseModelRow.is_in_registry, BaseModelRow.disabled_at.is_(None))
