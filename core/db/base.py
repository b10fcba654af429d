"""The declarative base: naming of constraints, and the column types and conditions that tables share."""

from __future__ import annotations

import datetime as dt
import uuid
from enum import StrEnum
from typing import Annotated, Any

from sqlalchemy import BigInteger, CheckConstraint, DateTime, MetaData, Text, Uuid, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, mapped_column

from core.domain.bounds import Bounds

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

Json = dict[str, Any]
CreatedAt = Annotated[dt.datetime, mapped_column(server_default=func.now())]
# Index condition: the row is deleted, and its objects are still stored.
UNPURGED = text("deleted_at is not null and purged_at is null")


class Row(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own protocol)
        dt.datetime: DateTime(timezone=True),
        Json: JSONB,
        list[Json]: JSONB,
        str: Text,
        int: BigInteger,
        uuid.UUID: Uuid,
    }


def check_known(column: str, values: type[StrEnum]) -> CheckConstraint:
    """Return the CHECK that a column holds one of these values, or null."""
    return CheckConstraint(f"{column} in ({quote_values(values)})", name=f"{column}_known")


def check_bounds(column: str, limits: Bounds) -> CheckConstraint:
    """Return the CHECK that a column is within its limits, or null."""
    return CheckConstraint(limits.check(column), name=f"{column}_bounded")


def quote_values(values: type[StrEnum]) -> str:
    """Return the values as SQL lists them."""
    return ", ".join(repr(str(value)) for value in values)
