"""What operators send and see under /admin."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.wire import Answer, RequestBody, optional_seconds, unix_seconds
from core.db.models import AuditEntry, BaseModelRow, Tenant
from core.domain import bounds
from core.domain.bases import BaseState
from core.domain.ids import IdKind, format_id
from core.domain.training import Quantization
from core.services.tenants import SLUG_PATTERN, TenantChange, TenantName


class CreateTenant(RequestBody):
    """The tenant to add."""

    slug: Annotated[str, Field(json_schema_extra={"pattern": f"^{SLUG_PATTERN}$"})]  # its service says it in words
    """The tenant's short name, which its models' names contain: lower-case letters, digits and hyphens."""
    name: TenantName | None = None
    """The tenant's full name. Null or absent for the slug."""


class ChangeTenant(TenantChange):
    """The fields to set of a tenant. A field that is absent stays as it is."""

    # Strict, so that `false` is no limit of 0. The parent reads the words of the command line as well.
    model_config = ConfigDict(strict=True, use_attribute_docstrings=True)
    name: TenantName = ""
    """The tenant's full name."""
    weight: Annotated[float, bounds.WEIGHT.field] = 1.0
    """The tenant's weight in the fair order. A tenant of weight 2 gets twice the share of one of weight 1."""
    max_running: Annotated[int, bounds.RUNNING_JOBS.field] = 0
    """How many of its jobs may run at a time."""
    max_queued: Annotated[int, bounds.QUEUED_JOBS.field] = 0
    """How many of its jobs may wait at a time."""
    max_storage_bytes: Annotated[int, bounds.STORED_BYTES.field] | None = None
    """How much it may store, in bytes. Null for no limit."""
    max_tokens_per_job: Annotated[int, bounds.TRAINED_TOKENS.field] | None = None
    """How many tokens one of its jobs may train on. Null for no limit."""
    max_gpu_seconds_per_month: Annotated[float, bounds.GPU_SECONDS.field] | None = None
    """How many GPU-seconds it may use in a calendar month (UTC). Null for no limit."""
    requests_per_minute: Annotated[int, bounds.REQUESTS_PER_MINUTE.field] | None = None
    """How many requests it may send a minute. Null for the service's own limit."""
    # A list of JSON becomes a tuple.
    allowed_base_models: tuple[str, ...] | None = Field(default=None, strict=False)
    """The base models that it may train against. Null for all of them."""
    is_disabled: bool = False
    """Whether its requests are refused and its jobs are held."""


class SwitchBaseModel(RequestBody):
    """Whether a base model is offered."""

    model_config = ConfigDict(strict=True)
    is_disabled: bool
    """Whether new jobs on the base model are refused."""


class TenantObject(Answer):
    """A tenant and its limits."""

    id: str
    """The tenant's id, which begins with `org-`."""
    object: Literal["tenant"] = "tenant"
    """The kind of this object."""
    slug: str
    """The tenant's short name."""
    name: str
    """The tenant's full name."""
    weight: float
    """The tenant's weight in the fair order."""
    max_running: int
    """How many of its jobs may run at a time."""
    max_queued: int
    """How many of its jobs may wait at a time."""
    max_storage_bytes: int | None
    """How much it may store, in bytes. Null for no limit."""
    max_tokens_per_job: int | None
    """How many tokens one of its jobs may train on. Null for no limit."""
    max_gpu_seconds_per_month: float | None
    """How many GPU-seconds it may use in a calendar month (UTC). Null for no limit."""
    requests_per_minute: int | None
    """How many requests it may send a minute. Null for the service's own limit."""
    allowed_base_models: list[str] | None
    """The base models that it may train against. Null for all of them."""
    is_disabled: bool
    """Whether its requests are refused and its jobs are held."""
    created_at: int
    """When the tenant was added, in Unix seconds."""
    deleted_at: int | None
    """When the tenant was deleted, in Unix seconds. Null if it was not."""
    erased_at: int | None
    """When the last of its rows and objects was erased, in Unix seconds. Null until then."""

    @classmethod
    def of(cls, row: Tenant) -> TenantObject:
        same = ("slug", "name", "allowed_base_models", *TenantChange.LIMITS)
        return cls(
            id=format_id(IdKind.TENANT, row.id),
            is_disabled=row.disabled_at is not None,
            created_at=unix_seconds(row.created_at),
            deleted_at=optional_seconds(row.deleted_at),
            erased_at=optional_seconds(row.erased_at),
            **{name: getattr(row, name) for name in same},
        )


class KnownBaseModelObject(Answer):
    """A base model as operators see it: whether it is offered, and whether a worker could load it."""

    id: str
    """The base model's name, as a request names it."""
    object: Literal["base_model"] = "base_model"
    """The kind of this object."""
    is_in_registry: bool
    """Whether the registry names the base model. One that it no longer names takes no new jobs."""
    is_disabled: bool
    """Whether an operator has switched the base model off."""
    quantizations: list[Quantization]
    """The quantizations in which the base can be trained against, besides full precision."""
    max_seq_len: int
    """The greatest number of tokens of a row."""
    max_rank: int
    """The greatest rank of an adapter."""
    slots: int
    """The number of jobs that one worker trains at a time against the base."""
    state: BaseState
    """Whether a worker could load the base."""
    state_reason: str | None
    """Why the base cannot be loaded. Null if it can, or if nobody has tried."""
    state_since: int
    """When `state` became what it is, in Unix seconds."""
    checked_by: str | None
    """The worker that found out. Null if nobody has tried."""

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
            state_since=unix_seconds(row.state_since),
            checked_by=row.checked_by,
        )


class AuditObject(Answer):
    """One change that somebody made, without any secret."""

    id: str
    """The entry's number, which is the cursor of the list."""
    object: Literal["audit_entry"] = "audit_entry"
    """The kind of this object."""
    created_at: int
    """When the change was made, in Unix seconds."""
    organization_id: str | None
    """The id of the tenant whose thing was changed. Null if it was no tenant's."""
    actor: str
    """Who made the change, such as `operator:olga:…` or `key:…` for an API key."""
    action: str
    """What was done, such as `tenant.changed`."""
    subject: str
    """What it was done to."""
    before: dict[str, Any]
    """The fields that differ, as they were. Empty for a thing that was added."""
    after: dict[str, Any]
    """The fields that differ, as they are since. Empty for a thing that was removed."""

    @classmethod
    def of(cls, row: AuditEntry) -> AuditObject:
        return cls(
            id=str(row.number),
            created_at=unix_seconds(row.created_at),
            organization_id=None if row.tenant_id is None else format_id(IdKind.TENANT, row.tenant_id),
            actor=row.actor,
            action=row.action,
            subject=row.subject,
            before=row.before,
            after=row.after,
        )
