"""Chooses the leading schedule process: one row for the whole cluster, with a lease by the database's clock.

The leader prolongs its lease in the transaction of every duty that changes rows. A process that was suspended, and
whose lease another has taken meanwhile, learns this from its first statement and changes nothing.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import func, or_, update
from sqlalchemy.dialects.postgresql import insert

from core.db.models import Leader
from core.db.session import ServiceSession

_SCHEDULE = "schedule"


def lead(session: ServiceSession, holder: str, *, lease_seconds: float) -> bool:
    """Take or prolong the leadership. False while another holds it. Holds its row until the transaction ends."""
    lease_until = func.now() + timedelta(seconds=lease_seconds)
    taken = insert(Leader).values(name=_SCHEDULE, holder=holder, lease_until=lease_until)
    taken = taken.on_conflict_do_update(
        index_elements=[Leader.name],
        set_={"holder": taken.excluded.holder, "lease_until": taken.excluded.lease_until},
        # now() is the begin of the transaction, before it waited for the row. So it can only judge a lease too young,
        # never too old.
        where=or_(Leader.holder == taken.excluded.holder, Leader.lease_until < func.now()),
    )
    return session.scalar(taken.returning(Leader.holder)) is not None


def resign(session: ServiceSession, holder: str) -> None:
    """Let another process lead at once. Does nothing if this holder does not lead."""
    session.execute(
        update(Leader).where(Leader.name == _SCHEDULE, Leader.holder == holder).values(lease_until=func.to_timestamp(0))
    )
