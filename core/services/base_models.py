"""The operator's base models: a YAML registry, loaded into the table when the database is migrated."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field
from sqlalchemy import ColumnElement, and_, any_, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.db.models import BaseModelRow, BaseTokenizerRow, Tenant
from core.domain import bounds
from core.domain.errors import ConflictError, NotFoundError
from core.domain.training import Frozen, Quantization


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


class Registry(Frozen):
    base_models: tuple[BaseModelEntry, ...]


def read_registry(path: Path) -> Registry:
    """Read a registry file. Raises ValueError that names the entry and the field at fault."""
    return Registry.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def sync_base_models(session: Session, registry: Registry) -> None:
    """Make the table say what the registry says; a base that left the registry is disabled, never deleted."""
    ids = [entry.id for entry in registry.base_models]
    session.execute(update(BaseModelRow).where(BaseModelRow.id.not_in(ids)).values(is_enabled=False))
    for entry in registry.base_models:
        values = entry.model_dump(mode="json") | {"is_enabled": True}
        statement = insert(BaseModelRow).values(values)
        session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values))


def record_tokenizer(session: Session, base_model_id: str, *, object_key: str) -> None:
    """Say where the tokenizer of a base is, as the worker that loaded it last has stored it."""
    values = {"base_model_id": base_model_id, "object_key": object_key, "published_at": func.now()}
    session.execute(
        insert(BaseTokenizerRow).values(values).on_conflict_do_update(index_elements=["base_model_id"], set_=values)
    )


def find_tokenizer(session: Session, base_model_id: str) -> str:
    """Return the object key of a base's tokenizer. Raises ConflictError before any worker has loaded the base."""
    query = select(BaseTokenizerRow.object_key).where(BaseTokenizerRow.base_model_id == base_model_id)
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


def switch_base_model(session: Session, base_model_id: str, *, is_disabled: bool) -> BaseModelRow:
    """Let tenants use a base or not, whatever the registry says. Jobs that have been submitted go on."""
    row = session.get(BaseModelRow, base_model_id)
    if row is None:
        raise NotFoundError(f"There is no base model {base_model_id[:200]!r}.", code="model_not_found")
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
    return and_(BaseModelRow.is_enabled, BaseModelRow.disabled_at.is_(None))
