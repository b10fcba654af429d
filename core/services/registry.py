"""The registry of base models: a YAML file, loaded when the database is migrated, and what operators add by hand."""

from __future__ import annotations

from pathlib import Path

import yaml
from sqlalchemy import and_, case, func, or_, update
from sqlalchemy.dialects.postgresql import insert

from core.db.models import BaseModelRow
from core.db.session import OwnerSession
from core.domain.bases import BaseModelEntry, BaseState, Registry
from core.domain.errors import ConflictError
from core.services.base_models import get_known_base_model

# The columns of a base's entry that decide whether it can be loaded.
_WHAT_IS_LOADED = ("source", "dtype", "target_modules", "chat_template")


def read_registry(path: Path) -> Registry:
    """Read a registry file. Raises ValueError that names the entry and the field at fault."""
    return Registry.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def sync_base_models(session: OwnerSession, registry: Registry) -> None:
    """Make the table match the registry. A base that left the registry is marked as such, and never deleted.

    Bases registered by hand stay, unless the registry names them.
    """
    ids = [entry.id for entry in registry.base_models]
    is_left = and_(BaseModelRow.id.not_in(ids), BaseModelRow.is_registered_by_hand.is_(False))
    session.execute(update(BaseModelRow).where(is_left).values(is_in_registry=False))
    for entry in registry.base_models:
        register_base_model(session, entry, is_by_hand=False)


def register_base_model(session: OwnerSession, entry: BaseModelEntry, *, is_by_hand: bool) -> None:
    """Add a base, or update its row. If its entry has changed, earlier findings no longer count."""
    values = entry.model_dump(mode="json") | {"is_enabled": True, "is_registered_by_hand": is_by_hand}
    statement = insert(BaseModelRow).values(values)
    row, given = BaseModelRow.__table__.c, statement.excluded
    is_changed = or_(*(row[name].is_distinct_from(given[name]) for name in _WHAT_IS_LOADED))
    forgotten = {"state": BaseState.UNCHECKED, "state_reason": None, "state_since": func.now(), "checked_by": None}
    reset = {name: case((is_changed, value), else_=row[name]) for name, value in forgotten.items()}
    session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values | reset))


def unregister_base_model(session: OwnerSession, base_model_id: str) -> None:
    """Remove a base that was registered by hand. Submitted jobs continue.

    Raises NotFoundError, and ConflictError for a base in the registry's file.
    """
    row = get_known_base_model(session, base_model_id)
    if row.is_in_registry and not row.is_registered_by_hand:
        raise ConflictError(f"{row.id} stands in the registry's file: take it out there and run `espalier migrate`.")
    session.execute(update(BaseModelRow).where(BaseModelRow.id == row.id).values(is_in_registry=False))
