"""Who is asking: the Bearer key of a request, checked offline by its checksum, then against its row.

A key that was found alive is believed for `TTL_SECONDS` without another look, so a revoked one is refused everywhere
within that time. What lasts longer than a request asks again with `Authenticator.recheck`.
"""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass

from sqlalchemy import Engine

from core.db.session import key_transaction, operator_transaction
from core.domain.api_keys import OPERATOR_PREFIX, ApiKey, parse_api_key
from core.domain.errors import UnauthenticatedError
from core.services.operators import OperatorIdentity, authenticate_operator
from core.services.tenants import Identity, authenticate, reauthenticate

TTL_SECONDS = 2.0
_MAX_KEYS = 10_000


@dataclass(frozen=True)
class _LiveKey:
    identity: Identity
    secret_hash: bytes
    until: float


class Authenticator:
    """Finds the owners of API keys, and remembers them for a moment. Shared by the threads of a process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._live: dict[str, _LiveKey] = {}

    def identify(self, authorization: str | None) -> Identity:
        """Return the owner of an Authorization header's key. Raises UnauthenticatedError. May ask the database."""
        api_key = _parse_bearer(authorization)
        if identity := self._recall(api_key):
            return identity
        with key_transaction(self._engine, api_key.key_id) as session:
            identity = authenticate(session, api_key)
        self._remember(identity, api_key)
        return identity

    def recall(self, authorization: str | None) -> Identity | None:
        """As `identify`, but asks nobody: None where the key is not remembered."""
        return self._recall(_parse_bearer(authorization))

    def recheck(self, identity: Identity) -> None:
        """Return while the key of an open stream is alive. Raises UnauthenticatedError. May ask the database."""
        if self._find(identity.key_id) is None:
            with key_transaction(self._engine, identity.key_id) as session:
                reauthenticate(session, identity.key_id)

    def _recall(self, api_key: ApiKey) -> Identity | None:
        known = self._find(api_key.key_id)
        is_known = known and hmac.compare_digest(known.secret_hash, api_key.secret_hash)
        return known.identity if known and is_known else None

    def _find(self, key_id: str) -> _LiveKey | None:
        known = self._live.get(key_id)
        return known if known and time.monotonic() < known.until else None

    def _remember(self, identity: Identity, api_key: ApiKey) -> None:
        if len(self._live) >= _MAX_KEYS:
            self._live.clear()
        self._live[api_key.key_id] = _LiveKey(identity, api_key.secret_hash, time.monotonic() + TTL_SECONDS)


def identify_operator(engine: Engine, authorization: str | None) -> OperatorIdentity | None:
    """Return the owner of an operator key, or None for whoever does not even claim to have one.

    Raises UnauthenticatedError for an operator key that is none of ours, or dead.
    """
    token = _bearer_of(authorization)
    if not token.startswith(OPERATOR_PREFIX):
        return None
    api_key = parse_api_key(token, prefix=OPERATOR_PREFIX)
    with operator_transaction(engine, actor=f"operator key {api_key.key_id}") as session:
        return authenticate_operator(session, api_key)


def _parse_bearer(authorization: str | None) -> ApiKey:
    token = _bearer_of(authorization)
    if not token:
        raise UnauthenticatedError("You didn't provide an API key. Send it as 'Authorization: Bearer <key>'.")
    return parse_api_key(token)


def _bearer_of(authorization: str | None) -> str:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
