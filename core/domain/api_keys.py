"""API keys: `esp_live_<key_id>_<30 random base62><6 base62 of CRC-32>`, and `esp_oper_...` for operators.

With the checksum a mistyped or truncated key is refused without a database query, and secret scanners recognise a
leaked one. Only the SHA-256 of the secret is stored: 178 random bits need no slow hash.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import secrets
import string
import uuid
import zlib
from dataclasses import dataclass, field
from enum import StrEnum

from core.domain.errors import NotFoundError, PermissionDeniedError, UnauthenticatedError

PREFIX = "esp_live"
OPERATOR_PREFIX = "esp_oper"
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
KEY_ID_LENGTH = 12
SECRET_LENGTH = 30
CHECKSUM_LENGTH = 6
# Two keys may have the same name, so that a new one can be rolled out while the old one still works.
MAX_LIVE_KEYS_PER_NAME = 2
MAX_LIVE_KEYS = 100
# The precision of `last_used_at`: using a key writes to its row at most this often.
LAST_USED_INTERVAL = dt.timedelta(minutes=1)

_WIRE_PREFIX = "key_"


class Scope(StrEnum):
    """What an API key may do in its own tenant. Every route needs exactly one.

    - `read`: List and read files, jobs, models and adapters, without their contents.
    - `submit`: Upload files, submit and steer jobs, and delete files, jobs and models.
    - `download`: Read the contents of files, adapters and checkpoints.
    - `admin`: Make and revoke API keys, and share checkpoints.
    """

    READ = "read"
    SUBMIT = "submit"
    DOWNLOAD = "download"
    ADMIN = "admin"


# The scopes of a key that asks for none: all except making keys.
DEFAULT_SCOPES = frozenset({Scope.READ, Scope.SUBMIT, Scope.DOWNLOAD})
ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True)
class Power:
    """The scopes and the expiry of a key. None means that it never expires."""

    scopes: frozenset[Scope]
    expires_at: dt.datetime | None

    def hand_down(self, *, scopes: frozenset[Scope] | None, expires_at: dt.datetime | None) -> Power:
        """Return the power of a key that this key makes. What is not asked for is taken from the maker.

        Raises PermissionDeniedError for more than the maker has.
        """
        given = self.scopes & DEFAULT_SCOPES if scopes is None else scopes
        if not given or given - self.scopes:
            raise PermissionDeniedError(
                f"A key makes keys with its own scopes only. This one has {', '.join(sorted(self.scopes))}.",
                code="insufficient_scope",
                param="scopes",
            )
        if self.expires_at is not None and expires_at is not None and expires_at > self.expires_at:
            raise PermissionDeniedError(
                f"A key makes no key that outlives it. This one expires at {self.expires_at.isoformat()}.",
                code="outlives_its_maker",
                param="expires_after",
            )
        return Power(given, expires_at or self.expires_at)


@dataclass(frozen=True)
class Identity:
    """The caller of a request: the owner of a tenant's live API key."""

    tenant_id: uuid.UUID
    key_id: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None = None
    expires_at: dt.datetime | None = None

    @property
    def actor(self) -> str:
        """The name of this key in the audit log."""
        return f"key:{self.key_id}"

    def limit_lifetime(self, lifetime: dt.timedelta, *, now: dt.datetime) -> dt.timedelta:
        """Return how long a URL or token handed out now may be valid: no longer than the key itself."""
        if self.expires_at is None:
            return lifetime
        return max(min(lifetime, self.expires_at - now), dt.timedelta(seconds=1))


@dataclass(frozen=True)
class OperatorIdentity:
    """The caller of a request: the owner of a live operator key."""

    name: str
    key_id: str
    is_read_only: bool

    @property
    def actor(self) -> str:
        return f"operator:{self.name}:{self.key_id}"


@dataclass(frozen=True)
class ApiKey:
    """An API key as its owner holds it. `key_id` is public, `secret` is not."""

    key_id: str
    secret: str = field(repr=False)
    prefix: str = PREFIX

    def __str__(self) -> str:
        body = f"{self.prefix}_{self.key_id}_{self.secret}"
        return body + _checksum(body)

    @property
    def secret_hash(self) -> bytes:
        return hashlib.sha256(self.secret.encode()).digest()


def generate_api_key(prefix: str = PREFIX) -> ApiKey:
    return ApiKey(key_id=_random_text(KEY_ID_LENGTH), secret=_random_text(SECRET_LENGTH), prefix=prefix)


def parse_api_key(text: str, *, prefix: str = PREFIX) -> ApiKey:
    """Return the parts of a key. Raises UnauthenticatedError when its form or its checksum is wrong."""
    body, checksum = text[:-CHECKSUM_LENGTH], text[-CHECKSUM_LENGTH:]
    before, found, rest = body.partition(f"{prefix}_")
    key_id, _, secret = rest.partition("_")
    is_ours = found and not before and len(key_id) == KEY_ID_LENGTH and len(secret) == SECRET_LENGTH
    if not is_ours or not set(key_id + secret) <= set(ALPHABET) or _checksum(body) != checksum:
        raise UnauthenticatedError("This is not an API key of this service: its form or checksum is wrong.")
    return ApiKey(key_id=key_id, secret=secret, prefix=prefix)


def format_key_id(key_id: str) -> str:
    """Return the wire id of a key, which is the public part of the key itself."""
    return _WIRE_PREFIX + key_id


def parse_key_id(text: str) -> str:
    """Return the public part in a key's wire id. Raises NotFoundError for a malformed id, as for an unknown one."""
    key_id = text.removeprefix(_WIRE_PREFIX)
    if not text.startswith(_WIRE_PREFIX) or len(key_id) != KEY_ID_LENGTH or not set(key_id) <= set(ALPHABET):
        raise NotFoundError(f"No such API key: {text[:100]!r}.")
    return key_id


def _random_text(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits
