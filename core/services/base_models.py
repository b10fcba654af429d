"""The operator's base models: a YAML registry, loaded into the table when the database is migrated."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field
from sqlalchemy import ColumnElement, and_, any_, case, func, not_, or_, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.db.models import BaseModelRow, BaseTokenizer, Tenant, Worker
from core.domain import bounds
from core.domain.bases import LICENSE_PATTERN, BaseState
from core.domain.errors import ConflictError, NotFoundError
from core.domain.training import Frozen, Quantization

# The columns of a base's entry that decide whether it can be loaded.
_WHAT_IS_LOADED = ("source", "dtype", "target_modules", "chat_template")


class BaseModelSource(Frozen):
    """Where the weights are: a local directory, a GGUF file, or a Hugging Face repository at a pinned commit."""

    kind: Literal["path", "gguf", "hub"]
    location: str
    revision: str = ""


class BaseModelEntry(Frozen):
    """One entry of the registry. `target_modules` are all the linears an adapter may be put on."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")
    source: BaseModelSource
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantizations: tuple[Quantization, ...] = ()
    target_modules: tuple[str, ...] = Field(min_length=1)
    max_seq_len: Annotated[int, bounds.SEQ_LEN.field]
    max_rank: Annotated[int, bounds.RANK.field] = 64
    slots: Annotated[int, bounds.SLOTS.field] = 8
    max_tokens_per_step: Annotated[int, bounds.TOKENS_PER_STEP.field] = 4096
    chat_template: str | None = None
    license: str | None = Field(default=None, pattern=LICENSE_PATTERN)


class Registry(Frozen):
    base_models: tuple[BaseModelEntry, ...]


def read_registry(path: Path) -> Registry:
    """Read a registry file. Raises ValueError that names the entry and the field at fault."""
    return Registry.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def sync_base_models(session: Session, registry: Registry) -> None:
    """Make the table say what the registry says; a base that left the registry is disabled, never deleted.

    What was registered by hand stays, unless the registry names it.
    """
    ids = [entry.id for entry in registry.base_models]
    is_left = and_(BaseModelRow.id.not_in(ids), BaseModelRow.is_registered_by_hand.is_(False))
    session.execute(update(BaseModelRow).where(is_left).values(is_in_registry=False))
    for entry in registry.base_models:
        register_base_model(session, entry, is_by_hand=False)


def register_base_model(session: Session, entry: BaseModelEntry, *, is_by_hand: bool) -> None:
    """Add a base, or make its row say what the entry says. What was found of one that has changed counts no more."""
    values = entry.model_dump(mode="json") | {"is_enabled": True, "is_registered_by_hand": is_by_hand}
    statement = insert(BaseModelRow).values(values)
    row, given = BaseModelRow.__table__.c, statement.excluded
    is_changed = or_(*(row[name].is_distinct_from(given[name]) for name in _WHAT_IS_LOADED))
    forgotten = {"state": BaseState.UNCHECKED, "state_reason": None, "state_since": func.now(), "checked_by": None}
    reset = {name: case((is_changed, value), else_=row[name]) for name, value in forgotten.items()}
    session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values | reset))


def unregister_base_model(session: Session, base_model_id: str) -> None:
    """Take a base that was registered by hand out again. Jobs that have been submitted go on.

    Raises NotFoundError, and ConflictError for one that stands in the registry's file.
    """
    row = get_known_base_model(session, base_model_id)
    if row.is_in_registry and not row.is_registered_by_hand:
        raise ConflictError(f"{row.id} stands in the registry's file: take it out there and run `espalier migrate`.")
    session.execute(update(BaseModelRow).where(BaseModelRow.id == row.id).values(is_in_registry=False))


def record_state(
    session: Session, base_model_id: str, *, state: BaseState, reason: str | None, by: str
) -> dt.datetime | None:
    """Say what whoever has tried to load a base has found, and return since when its row says what it says now.

    That it is unusable is not believed while another worker lives that holds it or found it well: then it is the
    finder's own trouble, such as a disk that is not mounted there.
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


def record_tokenizer(session: Session, base_model_id: str, *, object_key: str) -> None:
    """Say where the tokenizer of a base is, as the worker that loaded it last has stored it."""
    values = {"base_model_id": base_model_id, "object_key": object_key, "published_at": func.now()}
    session.execute(
        insert(BaseTokenizer).values(values).on_conflict_do_update(index_elements=["base_model_id"], set_=values)
    )


def find_tokenizer(session: Session, base_model_id: str) -> str:
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


def list_base_models(session: Session) -> Sequence[BaseModelRow]:
    """Return every base that is served, whoever may use it."""
    return session.scalars(select(BaseModelRow).where(_is_served()).order_by(BaseModelRow.id)).all()


def list_known_base_models(session: Session) -> Sequence[BaseModelRow]:
    """Return every base that ever stood in the registry. For operators."""
    return session.scalars(select(BaseModelRow).order_by(BaseModelRow.id)).all()


def get_known_base_model(session: Session, base_model_id: str) -> BaseModelRow:
    """Return a base that ever stood in the registry. For operators."""
    row = session.get(BaseModelRow, base_model_id)
    if row is None:
        raise NotFoundError(f"There is no base model {base_model_id[:200]!r}.", code="model_not_found")
    return row


def switch_base_model(session: Session, base_model_id: str, *, is_disabled: bool) -> BaseModelRow:
    """Let tenants use a base or not, whatever the registry says. Jobs that have been submitted go on."""
    row = get_known_base_model(session, base_model_id)
    session.execute(
        update(BaseModelRow)
        .where(BaseModelRow.id == base_model_id)
        .values(disabled_at=func.coalesce(BaseModelRow.disabled_at, func.now()) if is_disabled else None)
    )
    session.refresh(row)
    return row


def list_allowed_base_models(session: Session, tenant_id: uuid.UUID) -> Sequence[BaseModelRow]:
    """Return the bases that the tenant may train against."""
    query = select(BaseModelRow).where(is_usable_by(tenant_id))
    return session.scalars(query.order_by(BaseModelRow.id)).all()


def get_base_model(session: Session, tenant_id: uuid.UUID, *, base_model_id: str) -> BaseModelRow:
    """Return a base that the tenant may use. One that it may not use does not exist for it."""
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
