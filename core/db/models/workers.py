"""Workers, as each described itself last."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import ARRAY, CheckConstraint, Text, func, text
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import Json, Row


class Worker(Row):
    """A supervisor, as its last heartbeat described it. It counts as alive until `alive_until`.

    `name` is its identity. `given_name` is its display name, which several workers may share; a worker older than 0028
    has only `name`. `clock_offset_seconds` is how far its clock is ahead of the database's.
    """

    __tablename__ = "workers"
    __table_args__ = (
        CheckConstraint("state in ('idle', 'loading', 'serving', 'stopping')", name="state_known"),
        CheckConstraint("slots_in_use between 0 and slots", name="slots_bounded"),
        CheckConstraint("pool is not null or slots = 0", name="slots_of_a_pool"),
    )
    name: Mapped[str] = mapped_column(primary_key=True)
    given_name: Mapped[str | None]
    pools: Mapped[list[str]] = mapped_column(ARRAY(Text))
    state: Mapped[str]
    pool: Mapped[str | None]
    slots: Mapped[int] = mapped_column(server_default="0")
    slots_in_use: Mapped[int] = mapped_column(server_default="0")
    # Since when it holds the base of `pool`, and the pool whose base it is about to load instead.
    pool_since: Mapped[dt.datetime | None]
    next_pool: Mapped[str | None]
    # Why it cannot load some bases, by pool, in words for operators.
    refusals: Mapped[Json] = mapped_column(server_default=text("'{}'::jsonb"))
    started_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    heartbeat_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    alive_until: Mapped[dt.datetime]
    version: Mapped[str | None]
    clock_offset_seconds: Mapped[float | None]
    is_clock_wrong: Mapped[bool] = mapped_column(server_default=text("false"))
