"""What operators send and see under /admin."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.db.models import AuditEntry, BaseModelRow, Tenant
from core.domain.bases import BaseState
from core.domain.ids import IdKind, format_id
from core.services.tenants import SLUG_PATTERN, TenantChange, TenantName


class CreateTenant(BaseModel):
    model_config = ConfigDict(extra="forbid")
    slug: Annotated[str, Field(json_schema_extra={"pattern": f"^{SLUG_PATTERN}$"})]  # its service says it in words
    name: TenantName | None = None


class ChangeTenant(TenantChange):
    """The fields to set of a tenant. One that is not given stays; null is no limit, or every base model."""

    model_config = ConfigDict(strict=True)  # false is no limit of 0; the parent reads the command line's words as well
    allowed_base_models: tuple[str, ...] | None = Field(default=None, strict=False)  # JSON's lists become a tuple


class SwitchBaseModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    is_disabled: bool


class TenantObject(BaseModel):
    id: str
    object: Literal["tenant"] = "tenant"
    slug: str
    name: str
    weight: float
    max_running: int
    max_queued: int
    max_storage_bytes: int | None
    max_tokens_per_job: int | None
    max_gpu_seconds_per_month: float | None
    requests_per_minute: int | None
    allowed_base_models: list[str] | None
    is_disabled: bool
    created_at: int
    deleted_at: int | None
    erased_at: int | None

    @classmethod
    def of(cls, row: Tenant) -> TenantObject:
        same = ("slug", "name", "allowed_base_models", *TenantChange.LIMITS)
        return cls(
            id=format_id(IdKind.TENANT, row.id),
            is_disabled=row.disabled_at is not None,
            created_at=int(row.created_at.timestamp()),
            deleted_at=_seconds(row.deleted_at),
            erased_at=_seconds(row.erased_at),
            **{name: getattr(row, name) for name in same},
        )


class KnownBaseModelObject(BaseModel):
    id: str
    object: Literal["base_model"] = "base_model"
    is_in_registry: bool
    is_disabled: bool
    quantizations: list[str]
    max_seq_len: int
    max_rank: int
    slots: int
    state: BaseState
    state_reason: str | None
    state_since: int
    checked_by: str | None

    @classmethod
    def of(cls, row: BaseModelRow) -> KnownBaseModelObject:
        return cls(
            id=row.id,
            is_in_registry=row.is_in_registry,
            is_disabled=row.disabled_at is not None,
            quantizations=row.quantizations,
            max_seq_len=row.max_seq_len,
            max_rank=row.max_rank,
            slots=row.slots,
            state=BaseState(row.state),
            state_reason=row.state_reason,
            state_since=int(row.state_since.timestamp()),
            checked_by=row.checked_by,
        )


class AuditObject(BaseModel):
    """One change: `before` and `after` hold the fields that differ, and never a secret."""

    id: str
    object: Literal["audit_entry"] = "audit_entry"
    created_at: int
    organization_id: str | None
    actor: str
    action: str
    subject: str
    before: dict[str, Any]
    after: dict[str, Any]

    @classmethod
    def of(cls, row: AuditEntry) -> AuditObject:
        return cls(
            id=str(row.number),
            created_at=int(row.created_at.timestamp()),
            organization_id=None if row.tenant_id is None else format_id(IdKind.TENANT, row.tenant_id),
            actor=row.actor,
            action=row.action,
            subject=row.subject,
            before=row.before,
            after=row.after,
        )


def _seconds(instant: dt.datetime | None) -> int | None:
    return None if instant is None else int(instant.timestamp())
