"""Authentication: the Bearer key of a request, checked offline by its checksum, then against its row.

A key that was found alive is trusted for `TTL_SECONDS` without asking the database. So a revoked key is refused
everywhere within that time. An open stream asks again with `Authenticator.recheck`. A key that was refused is refused
for the same time without asking the database.

Two groups of threads look keys up: one for unknown keys, of which there may be any number, and one for keys that were
found alive before. So unknown keys never delay known ones.
"""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass

from anyio import CapacityLimiter, to_thread
from sqlalchemy import Engine

from core.db.session import key_transaction, operator_transaction
from core.domain.api_keys import OPERATOR_PREFIX, ApiKey, Identity, OperatorIdentity, parse_api_key
from core.domain.errors import UnauthenticatedError
from core.services.api_keys import authenticate, reauthenticate
from core.services.operators import authenticate_operator

TTL_SECONDS = 2.0
_MAX_KEYS = 10_000
_MAX_REFUSED = 1000
STRANGERS = CapacityLimiter(4)
ACQUAINTANCES = CapacityLimiter(8)


@dataclass(frozen=True)
class _LiveKey:
    identity: Identity
    secret_hash: bytes
    until: float


@dataclass(frozen=True)
class _Refusal:
    message: str
    code: str
    until: float


class Authenticator:
    """Finds the owners of API keys and remembers them for a moment. The threads of a process share it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._live: dict[str, _LiveKey] = {}
        self._refused: dict[bytes, _Refusal] = {}

    async def find(self, authorization: str | None) -> Identity:
        """Return what `identify` returns. A thread asks the database, so that the event loop goes on."""
        if identity := self.recall(authorization):
            return identity
        places = ACQUAINTANCES if self._has_met(_parse_bearer(authorization)) else STRANGERS
        return await to_thread.run_sync(self.identify, authorization, limiter=places)

    def identify(self, authorization: str | None) -> Identity:
        """Return the owner of an Authorization header's key. Raises UnauthenticatedError. May ask the database."""
        api_key = _parse_bearer(authorization)
        if identity := self._recall(api_key):
            return identity
        try:
            with key_transaction(self._engine, api_key.key_id) as session:
                identity = authenticate(session, api_key)
        except UnauthenticatedError as error:
            self._refuse(api_key, error)
            raise
        self._remember(identity, api_key)
        return identity

    def recall(self, authorization: str | None) -> Identity | None:
        """Return the owner of a remembered key, else None. Raises UnauthenticatedError. Never asks the database."""
        return self._recall(_parse_bearer(authorization))

    def recheck(self, identity: Identity) -> None:
        """Check that the key of an open stream is still alive. Raises UnauthenticatedError. May ask the database."""
        if self._find(identity.key_id) is None:
            with key_transaction(self._engine, identity.key_id) as session:
                reauthenticate(session, identity.key_id)

    def _recall(self, api_key: ApiKey) -> Identity | None:
        refusal = self._refused.get(_fingerprint(api_key))
        if refusal and time.monotonic() < refusal.until:
            raise UnauthenticatedError(refusal.message, code=refusal.code)
        known = self._find(api_key.key_id)
        is_known = known and hmac.compare_digest(known.secret_hash, api_key.secret_hash)
        return known.identity if known and is_known else None

    def _has_met(self, api_key: ApiKey) -> bool:
        """Return whether a key was alive when it was last looked up, however long ago that was."""
        met = self._live.get(api_key.key_id)
        return met is not None and hmac.compare_digest(met.secret_hash, api_key.secret_hash)

    def _find(self, key_id: str) -> _LiveKey | None:
        known = self._live.get(key_id)
        return known if known and time.monotonic() < known.until else None

    def _remember(self, identity: Identity, api_key: ApiKey) -> None:
        if len(self._live) >= _MAX_KEYS:
            self._live.clear()
        self._live[api_key.key_id] = _LiveKey(identity, api_key.secret_hash, time.monotonic() + TTL_SECONDS)

    def _refuse(self, api_key: ApiKey, error: UnauthenticatedError) -> None:
        if self._has_met(api_key):
            self._live.pop(api_key.key_id, None)
        if len(self._refused) >= _MAX_REFUSED:
            self._refused.clear()
        self._refused[_fingerprint(api_key)] = _Refusal(error.message, error.code, time.monotonic() + TTL_SECONDS)


async def find_operator(engine: Engine, authorization: str | None) -> OperatorIdentity | None:
    """Return what `identify_operator` returns. A thread asks the database, so that the event loop goes on."""
    if not _bearer_of(authorization).startswith(OPERATOR_PREFIX):
        return None
    return await to_thread.run_sync(identify_operator, engine, authorization, limiter=STRANGERS)


def identify_operator(engine: Engine, authorization: str | None) -> OperatorIdentity | None:
    """Return the owner of an operator key, or None if the header holds no such key.

    Raises UnauthenticatedError for an operator key that is unknown, revoked or expired.
    """
    token = _bearer_of(authorization)
    if not token.startswith(OPERATOR_PREFIX):
        return None
    api_key = parse_api_key(token, prefix=OPERATOR_PREFIX)
    with operator_transaction(engine, actor=f"operator key {api_key.key_id}") as session:
        return authenticate_operator(session, api_key)


def _fingerprint(api_key: ApiKey) -> bytes:
    return api_key.key_id.encode() + api_key.secret_hash


def _parse_bearer(authorization: str | None) -> ApiKey:
    token = _bearer_of(authorization)
    if not token:
        raise UnauthenticatedError("You didn't provide an API key. Send it as 'Authorization: Bearer <key>'.")
    if token.startswith(OPERATOR_PREFIX):
        parse_api_key(token, prefix=OPERATOR_PREFIX)
        raise UnauthenticatedError("This is an operator's key: it opens /admin only. Use a tenant's API key here.")
    return parse_api_key(token)


def _bearer_of(authorization: str | None) -> str:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
