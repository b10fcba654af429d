"""URLs of databases as people write them: all that libpq reads, with the prefix of any tool.

Several hosts are one database: a primary and its standbys. Unless the URL says otherwise, it means the host that takes
writes.

One parameter is our own: `pooler=transaction` says that a pooler is in between that gives each transaction another
session, as PgBouncer does in this mode. Nothing can then outlive a transaction: no statement is prepared, and LISTEN is
not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict

_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
_POOLER = "pooler"
_REFUSAL = (
    "This is no URL of a database. Write postgresql://user:password@host:port/name, and what a password has of "
    "/, @, : and % percent-encoded."
)


@dataclass(frozen=True)
class DatabaseAddress:
    """`parameters` are libpq's. `is_pooled` says that each transaction may have another session."""

    parameters: Mapping[str, str] = field(repr=False)
    is_pooled: bool


def read_url(url: str) -> DatabaseAddress:
    """Raises ValueError, which quotes nothing of the URL, because the URL contains a password."""
    parts = _split(url)
    pooler, said = _take(parts.query, _POOLER)
    if pooler not in ([], ["session"], ["transaction"]):
        raise ValueError("The parameter pooler of a database's URL is session or transaction.")
    try:
        found = conninfo_to_dict(f"postgresql://{parts.login}{parts.place}?{said}")
    except psycopg.Error:  # its message quotes the value that it could not read
        raise ValueError(_REFUSAL) from None
    parameters = {name: str(value) for name, value in found.items()}
    are_ports = all(port.isdecimal() or not port for port in parameters.get("port", "").split(","))
    # A password ends at an @ that is not percent-encoded. If more than one is left, part of a password was taken for a
    # port or a name, and would be shown.
    if not are_ports or "@" in parts.place or "@" in parameters.get("host", ""):
        raise ValueError(_REFUSAL)
    if "," in parameters.get("host", ""):
        parameters.setdefault("target_session_attrs", "read-write")
    return DatabaseAddress(parameters, is_pooled=pooler == ["transaction"])


def with_login(url: str, *, user: str, password: str) -> str:
    """Return the URL by which another login reaches the same database."""
    parts = _split(url)
    _, said = _take(parts.query, "user", "password")
    login = f"{quote(user, safe='')}:{quote(password, safe='')}"
    return f"postgresql://{login}@{parts.place}" + (f"?{said}" if said else "")


@dataclass(frozen=True)
class _Parts:
    """`login` ends in its @. `place` is the hosts and the name."""

    login: str = field(repr=False)
    place: str
    query: str = field(repr=False)


def _split(url: str) -> _Parts:
    """Split a URL where libpq does: a login may contain a question mark, but no slash."""
    scheme, has_scheme, rest = url.partition("://")
    if not has_scheme or scheme not in _SCHEMES:
        raise ValueError(_REFUSAL)
    login, is_login, behind = rest.partition("@")
    if not is_login or "/" in login:
        login, behind = "", rest
    place, _, query = behind.partition("?")
    return _Parts(f"{login}@" if login else "", place, query)


def _take(query: str, *names: str) -> tuple[list[str], str]:
    """Return the values of some parameters of a query, and the rest of the query exactly as it was written."""
    pairs = [pair for pair in query.split("&") if pair]
    taken = [pair.partition("=")[2] for pair in pairs if pair.partition("=")[0] in names]
    return taken, "&".join(pair for pair in pairs if pair.partition("=")[0] not in names)
