"""Checks PostgreSQL: the server, the schema, the roles and their rights, and the clock."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from cli.doctor.findings import Finding, failed, ok, skipped, warning
from cli.reporting import describe_error
from core.db.revisions import list_revisions
from core.db.roles import AUDITOR, BACKUP, OPERATOR, ROLES, SERVING
from core.db.session import DATABASE_ERRORS, ServiceSession, SessionKind, service_transaction

MIGRATE = "Run `espalier migrate` with this version of the code."
_OLDEST_MAJOR, _RECOMMENDED_MAJOR = 14, 16
_BUSY_PART = 0.8
_ODD_SECONDS, _WRONG_SECONDS = 1.0, 10.0
# A right that each role needs for its first statement. The migrations have the full list.
_NEEDED = (
    ("espalier_api", "jobs", "select"),
    ("espalier_api", "jobs", "insert"),
    ("espalier_worker", "jobs", "select"),
    ("espalier_worker", "workers", "insert"),
    ("espalier_schedule", "jobs", "select"),
    ("espalier_schedule", "leaders", "insert"),
    ("espalier_operator", "tenants", "select"),
    ("espalier_operator", "pool_demand", "select"),
    ("espalier_scaler", "pool_demand", "select"),
)
_MISSING_RIGHTS = text("""
select n.role || ' may not ' || n.verb || ' ' || n.relation
from unnest(cast(:roles as text[]), cast(:relations as text[]), cast(:verbs as text[])) n (role, relation, verb)
where to_regrole(n.role) is not null and (
    to_regclass(n.relation) is null or not has_table_privilege(n.role, to_regclass(n.relation), n.verb))
""")
_OPEN_TABLES = text("""
select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname = 'public' and c.relkind in ('r', 'p') and not (c.relrowsecurity and c.relforcerowsecurity)
  and (c.relname = 'tenants' or exists (
    select from pg_attribute a where a.attrelid = c.oid and a.attname = 'tenant_id' and not a.attisdropped))
order by 1
""")


def check_database(engine: Engine) -> Finding:
    """Check that the server answers, and report its version and how many of its connections are in use."""
    query = text("""
        select current_setting('server_version_num')::int / 10000, current_setting('server_version'), current_user,
            current_setting('max_connections')::int,
            (select count(*) from pg_stat_activity where backend_type = 'client backend')
    """)
    try:
        with service_transaction(engine) as session:
            major, version, role, num_allowed, num_open = session.execute(query).one()
    except (SQLAlchemyError, *DATABASE_ERRORS) as error:
        return failed(
            "database", describe_error(error), remedy="See that the URL, the network and pg_hba.conf let it in."
        )
    says = f"PostgreSQL {version} answers to {role}; {num_open} of {num_allowed} connections are open."
    if major < _OLDEST_MAJOR:
        return failed("database", says, remedy=f"Use PostgreSQL {_RECOMMENDED_MAJOR} or newer.")
    if major < _RECOMMENDED_MAJOR:
        return warning("database", says, remedy=f"It is tried on 18; use {_RECOMMENDED_MAJOR} or newer.")
    if num_open > _BUSY_PART * num_allowed:
        return warning("database", says, remedy="Raise max_connections, or run fewer API processes.")
    return ok("database", says)


def check_schema(session: ServiceSession) -> Finding:
    """Compare the database's schema with the newest that this code knows."""
    known = list_revisions()
    if session.scalar(text("select to_regclass('public.alembic_version')")) is None:
        return failed("schema", "The database has no schema yet.", remedy=MIGRATE)
    found = session.scalar(text("select version_num from alembic_version"))
    if found == known[-1]:
        return ok("schema", f"It is at {found}, as this code expects.")
    if found in known:
        return failed("schema", f"It is at {found}; this code expects {known[-1]}.", remedy=MIGRATE)
    return failed(
        "schema", f"It is at {found}, which this code does not know.", remedy="Run the newer version of the code."
    )


def check_roles(session: ServiceSession) -> Finding:
    """Check that the runtime roles exist, can log in, and have no more rights than they should."""
    query = text("select rolname, rolcanlogin, rolsuper or rolbypassrls from pg_roles where rolname = any(:roles)")
    found = {
        name: (can_log_in, is_mighty) for name, can_log_in, is_mighty in session.execute(query, {"roles": list(ROLES)})
    }
    missing = sorted(set(ROLES) - set(found))
    if missing:
        return failed("roles", f"There is no role {', '.join(missing)}.", remedy=MIGRATE)
    mighty = sorted(name for name, (_, is_mighty) in found.items() if is_mighty)
    if mighty:
        remedy = "Run `alter role ... nosuperuser nobypassrls` for each of them."
        return failed("roles", f"{', '.join(mighty)} may pass row-level security.", remedy=remedy)
    if not session.scalar(text("select pg_has_role('espalier_api', 'espalier_operator', 'MEMBER')")):
        remedy = "Run `grant espalier_operator to espalier_api`."
        return failed("roles", "espalier_api cannot become an operator: /admin does not open.", remedy=remedy)
    closed = sorted(name for name in SERVING if not found[name][0])
    if closed:
        named = ", ".join(f"{name.upper()}_PASSWORD" for name in closed)
        return failed("roles", f"{', '.join(closed)} cannot log in.", remedy=f"Set {named} and run `espalier migrate`.")
    return ok(
        "roles", f"{len(found)} roles are there; the three that serve can log in; none passes row-level security."
    )


def check_grants(session: ServiceSession) -> Finding:
    """Check that no table of tenants is open, and that each role has the rights for its first statement."""
    open_tables = session.scalars(_OPEN_TABLES).all()
    if open_tables:
        remedy = "Run `alter table ... enable row level security, force row level security` for each of them."
        return failed("grants", f"Row-level security is not forced on {', '.join(open_tables)}.", remedy=remedy)
    roles, relations, verbs = (list(each) for each in zip(*_NEEDED, strict=True))
    missing = session.scalars(_MISSING_RIGHTS, {"roles": roles, "relations": relations, "verbs": verbs}).all()
    if missing:
        remedy = "Somebody has revoked it: grant it again, as the migrations do."
        return failed("grants", f"{'; '.join(missing)}.", remedy=remedy)
    return ok("grants", "Row-level security is forced on every table of tenants; each role has what it needs.")


def check_operator(session: ServiceSession) -> Finding:
    """Check that the role of operators' commands can become the roles that these commands and `pg_dump` need."""
    me = session.scalar(text("select current_user"))
    if me in SERVING and me != "espalier_api":
        return skipped("operator", f"{me} is no operator, and needs not be.")
    for role in (OPERATOR,) if me in SERVING else (OPERATOR, AUDITOR, BACKUP):
        try:
            with session.begin_nested():
                session.execute(text(f"set local role {role}"))
                session.execute(text("reset role"))
        except (SQLAlchemyError, *DATABASE_ERRORS) as error:
            is_told = session.scalars(text("select current_setting('server_version_num')::int >= 160000")).one()
            grant = f"grant {role} to {me}" + (" with set true" if is_told else "")
            return failed("operator", describe_error(error), remedy=f"Run `{grant}` as a role that may.")
    return ok("operator", f"{me} can act as an operator.")


def check_clock(
    session: ServiceSession, *, now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)
) -> Finding:
    """Compare this host's clock with the database's, to within the duration of the query."""
    before = now()
    theirs = session.scalars(text("select clock_timestamp()")).one()
    after = now()
    ahead = max((before - theirs).total_seconds(), (theirs - after).total_seconds(), 0.0)
    says = f"This host and the database differ by {ahead:.1f} s at least."
    remedy = "Let both hosts follow a time server: links are signed, and keys expire, by these clocks."
    if ahead > _WRONG_SECONDS:
        return failed("clock", says, remedy=remedy)
    if ahead > _ODD_SECONDS:
        return warning("clock", says, remedy=remedy)
    return ok("clock", "This host and the database have the same time.")


CHECKS: tuple[tuple[str, Callable[[ServiceSession], Finding]], ...] = (
    ("schema", check_schema),
    ("roles", check_roles),
    ("grants", check_grants),
    ("operator", check_operator),
    ("clock", check_clock),
)


def run_each(
    checks: tuple[tuple[str, Callable[[SessionKind], Finding]], ...],
    open_transaction: Callable[[], AbstractContextManager[SessionKind]],
) -> Iterator[Finding]:
    """Yield each check's result, in a separate transaction. A check without the necessary rights is skipped."""
    for name, check in checks:
        try:
            with open_transaction() as session:
                yield check(session)
        except DATABASE_ERRORS as error:
            yield failed(name, describe_error(error), remedy="See the check of the database.")
        except SQLAlchemyError as error:
            yield skipped(name, describe_error(error), remedy="Set ESPALIER_OWNER_DATABASE_URL to look at it.")
