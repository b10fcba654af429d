"""Finds what a role cannot see. A count over all rows is worthless where row-level security hides some of them."""

from __future__ import annotations

from sqlalchemy import text

from core.db.session import AuditorSession

# A permissive policy without a condition shows all rows. Any restrictive policy may hide some.
_HIDDEN = text("""
with of_reading as (
    select * from pg_policy p where p.polcmd in ('r', '*')
      and exists (select from unnest(p.polroles) r where r = 0 or pg_has_role(r, 'USAGE'))
)
select c.relname from pg_class c
where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') and (
    not has_table_privilege(c.oid, 'select') or row_security_active(c.oid) and (
        exists (select from of_reading p where p.polrelid = c.oid and not p.polpermissive)
        or not exists (
            select from of_reading p where p.polrelid = c.oid and pg_get_expr(p.polqual, p.polrelid) = 'true')))
order by c.relname
""")


class HiddenRowsError(Exception):
    """The present role may not see every row of some tables. The message names them."""


def require_sight(session: AuditorSession) -> None:
    """Raise HiddenRowsError unless this transaction's role sees every row of every table."""
    hidden = session.scalars(_HIDDEN).all()
    if hidden:
        role = session.scalars(text("select current_user")).one()
        raise HiddenRowsError(f"{role} does not see every row of {', '.join(hidden)}.")
