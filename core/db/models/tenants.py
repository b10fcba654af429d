"""Tenants, with their limits and their use, and the bytes that each stores."""

from __future__ import annotations

import datetime as dt
import uuid

from sqlalchemy import ARRAY, CheckConstraint, ForeignKey, Text, func
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import CreatedAt, Row, check_bounds
from core.domain import bounds


class Tenant(Row):
    __tablename__ = "tenants"
    __table_args__ = (
        CheckConstraint("slug ~ '^[a-z0-9][a-z0-9-]{0,31}$'", name="slug_form"),
        check_bounds("weight", bounds.WEIGHT),
        check_bounds("usage", bounds.USAGE_SECONDS),
        check_bounds("max_running", bounds.RUNNING_JOBS),
        check_bounds("max_queued", bounds.QUEUED_JOBS),
        check_bounds("max_storage_bytes", bounds.STORED_BYTES),
        check_bounds("max_tokens_per_job", bounds.TRAINED_TOKENS),
        check_bounds("max_gpu_seconds_per_month", bounds.GPU_SECONDS),
        check_bounds("requests_per_minute", bounds.REQUESTS_PER_MINUTE),
        CheckConstraint("isfinite(usage_at)", name="usage_at_finite"),
        CheckConstraint("lift between -1e12 and 1e12", name="lift_bounded"),
        CheckConstraint("deleted_at is null or disabled_at is not null", name="disabled_when_deleted"),
    )
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    weight: Mapped[float] = mapped_column(server_default="1")
    # GPU-seconds, decayed up to `usage_at`. The lift decays in the same way. Their sum is the tenant's account in fair
    # share.
    usage_seconds: Mapped[float] = mapped_column("usage", server_default="0")
    lift_seconds: Mapped[float] = mapped_column("lift", server_default="0")
    usage_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    max_running: Mapped[int] = mapped_column(server_default="8")
    max_queued: Mapped[int] = mapped_column(server_default="1000")
    # Null means no limit, and for the list that every base is allowed.
    max_storage_bytes: Mapped[int | None]
    max_tokens_per_job: Mapped[int | None]
    max_gpu_seconds_per_month: Mapped[float | None]
    requests_per_minute: Mapped[int | None]
    allowed_base_models: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    disabled_at: Mapped[dt.datetime | None]
    # Since when it is being erased, and since when only this row and its bookings are left.
    deleted_at: Mapped[dt.datetime | None]
    erased_at: Mapped[dt.datetime | None]
    created_at: Mapped[CreatedAt]


class StorageTotal(Row):
    """The bytes of all rows of a tenant whose objects still exist. Triggers keep the sum."""

    __tablename__ = "storage_totals"
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    num_bytes: Mapped[int]
