"""API keys of tenants and of operators. Only the hash of a secret is stored."""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy import ARRAY, CheckConstraint, ForeignKey, ForeignKeyConstraint, Index, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Row, quote_values
from core.domain.api_keys import Scope


class ApiKeyRow(Row):
    __tablename__ = "api_keys"
    __table_args__ = (
        CheckConstraint("length(secret_hash) = 32", name="secret_hash_length"),
        CheckConstraint(f"scopes <@ array[{quote_values(Scope)}] and scopes <> '{{}}'", name="scopes_known"),
        CheckConstraint("length(name) between 1 and 64", name="name_length"),
        UniqueConstraint("tenant_id", "key_id"),
        ForeignKeyConstraint(["tenant_id", "created_by"], ["api_keys.tenant_id", "api_keys.key_id"]),
        Index("ix_api_keys_created_by", "created_by"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), index=True)
    key_id: Mapped[str] = mapped_column(unique=True)
    secret_hash: Mapped[bytes]
    name: Mapped[str]
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    created_by: Mapped[str | None]  # the key that made this one; null if an operator did
    expires_at: Mapped[dt.datetime | None]
    last_used_at: Mapped[dt.datetime | None]
    revoked_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class OperatorKey(Row):
    __tablename__ = "operator_keys"
    __table_args__ = (
        CheckConstraint("length(secret_hash) = 32", name="secret_hash_length"),
        CheckConstraint("length(name) between 1 and 64", name="name_length"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(unique=True)
    secret_hash: Mapped[bytes]
    name: Mapped[str]
    is_read_only: Mapped[bool] = mapped_column(server_default=text("false"))
    expires_at: Mapped[dt.datetime | None]
    last_used_at: Mapped[dt.datetime | None]
    revoked_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]
