"""Checks what runs: the leading schedule, the workers alive, and whether the bases can be used. Runs as an operator."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import text

from cli.doctor.findings import Finding, failed, ok, warning
from core.db.session import OperatorSession
from core.services.workers import list_refusals
from core.version import read_version

_MAX_NAMED = 5
_POOLS = text("""
select b.id || '@' || q.name as pool, exists (
    select from workers w
    where b.id || '@' || q.name = any (w.pools) and w.alive_until > now() and w.state <> 'stopping'
      and not w.is_clock_wrong)
from base_models b cross join lateral unnest(array['none'] || b.quantizations) q (name)
where b.is_enabled and b.disabled_at is null order by 1
""")


def check_schedule(session: OperatorSession) -> Finding:
    """Check that a schedule leads. Without one, workers are not woken, leases stay and objects are not deleted."""
    query = text("select holder, lease_until > now() from leaders where name = 'schedule'")
    row = session.execute(query).one_or_none()
    remedy = "Start `python -m schedule`, and read its log."
    if row is None:
        return failed("schedule", "No schedule has ever led.", remedy=remedy)
    holder, is_leading = row
    if not is_leading:
        return failed("schedule", f"No schedule leads; {holder} was the last.", remedy=remedy)
    return ok("schedule", f"{holder} leads.")


def check_workers(session: OperatorSession) -> Finding:
    """Check that workers of this version, which can load their bases, serve the pools on offer."""
    alive = text("select name, version from workers where alive_until > now() and state <> 'stopping' order by name")
    workers = session.execute(alive).all()
    unserved = [pool for pool, is_served in session.execute(_POOLS) if not is_served]
    num_queued = session.scalar(text("select coalesce(sum(num_queued), 0)::bigint from queues"))
    if not workers:
        says = f"No worker is alive; {num_queued} jobs are queued."
        remedy = "Start `python -m worker`, or see why nothing scales up."
        return failed("workers", says, remedy=remedy) if num_queued else warning("workers", says, remedy=remedy)
    clocks = "select name, clock_offset_seconds from workers where alive_until > now() and is_clock_wrong order by name"
    wrong = [f"{name} ({offset:+.0f} s)" for name, offset in session.execute(text(clocks))]
    if wrong:
        says = f"The clocks of their hosts are wrong, so that they claim nothing: {_name_some(wrong)}."
        return failed("workers", says, remedy="Set them: run chrony or another NTP client on every host.")
    refusals = list_refusals(session)
    if refusals:
        first = refusals[0]
        says = f"{first.worker} cannot load {first.pool}: {first.reason}"
        return warning("workers", says, remedy="`espalier base-models list` shows them all.")
    if unserved:
        says = f"{len(workers)} are alive, and none of them serves {_name_some(unserved)}."
        return warning("workers", says, remedy="Name them in ESPALIER_WORKER_POOLS, unless they scale from nothing.")
    others = [name for name, version in workers if version != str(read_version())]
    if others:
        says = f"{len(workers)} are alive; {_name_some(others)} runs another version than this one."
        return warning("workers", says, remedy="Finish the roll-out: `espalier workers` shows the versions.")
    return ok("workers", f"{len(workers)} are alive and serve every pool on offer.")


def check_bases(session: OperatorSession) -> Finding:
    """Check that there is a base model on offer, and that none is known to be unusable."""
    query = text("""
        select id, state, state_reason from base_models where is_enabled and disabled_at is null order by id
    """)
    rows = session.execute(query).all()
    if not rows:
        return failed(
            "bases", "No base model is on offer.", remedy="Add one: `espalier base-models add`, or the registry."
        )
    unusable = [f"{base_id} ({reason})" for base_id, state, reason in rows if state == "unusable"]
    if unusable:
        remedy = "Mend it, then `espalier base-models check ID` where the workers run."
        return failed("bases", f"Unusable: {_name_some(unusable)}", remedy=remedy)
    unchecked = [base_id for base_id, state, _ in rows if state == "unchecked"]
    if unchecked:
        says = f"Nobody has loaded {_name_some(unchecked)} yet."
        return warning("bases", says, remedy="`espalier base-models check ID` loads it once, where the workers run.")
    return ok("bases", f"{len(rows)} on offer, and each has been loaded.")


def _name_some(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


CHECKS: tuple[tuple[str, Callable[[OperatorSession], Finding]], ...] = (
    ("schedule", check_schedule),
    ("workers", check_workers),
    ("bases", check_bases),
)
