"""Who is asking: the Bearer key of a request, checked offline by its checksum, then against its row."""

from __future__ import annotations

from sqlalchemy import Engine

from core.db.session import key_transaction
from core.domain.api_keys import parse_api_key
from core.domain.errors import UnauthenticatedError
from core.services.tenants import Identity, authenticate


def identify(engine: Engine, authorization: str | None) -> Identity:
    """Return the owner of an Authorization header's key. Raises UnauthenticatedError."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise UnauthenticatedError("You didn't provide an API key. Send it as 'Authorization: Bearer <key>'.")
    api_key = parse_api_key(token.strip())
    with key_transaction(engine, api_key.key_id) as session:
        return authenticate(session, api_key)
