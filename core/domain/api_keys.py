"""API keys: `esp_live_<key_id>_<30 random base62><6 base62 of CRC-32>`.

The checksum lets a mistyped or truncated key be refused without a look at the database, and a leaked one be recognised
by secret scanners. Only the SHA-256 of the secret is stored: 178 random bits need no slow hash.
"""

from __future__ import annotations

import hashlib
import secrets
import string
import zlib
from dataclasses import dataclass, field

from core.domain.errors import UnauthenticatedError

PREFIX = "esp_live"
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
KEY_ID_LENGTH = 12
SECRET_LENGTH = 30
CHECKSUM_LENGTH = 6


@dataclass(frozen=True)
class ApiKey:
    """An API key as its owner holds it. `key_id` is public, `secret` is not."""

    key_id: str
    secret: str = field(repr=False)

    def __str__(self) -> str:
        body = f"{PREFIX}_{self.key_id}_{self.secret}"
        return body + _checksum(body)

    @property
    def secret_hash(self) -> bytes:
        return hashlib.sha256(self.secret.encode()).digest()


def generate_api_key() -> ApiKey:
    return ApiKey(key_id=_random_text(KEY_ID_LENGTH), secret=_random_text(SECRET_LENGTH))


def parse_api_key(text: str) -> ApiKey:
    """Return the parts of a key. Raises UnauthenticatedError when its form or its checksum is wrong."""
    body, checksum = text[:-CHECKSUM_LENGTH], text[-CHECKSUM_LENGTH:]
    prefix, _, rest = body.rpartition(f"{PREFIX}_")
    key_id, _, secret = rest.partition("_")
    if prefix or len(key_id) != KEY_ID_LENGTH or len(secret) != SECRET_LENGTH or _checksum(body) != checksum:
        raise UnauthenticatedError("This is not an API key of this service: its form or checksum is wrong.")
    return ApiKey(key_id=key_id, secret=secret)


def _random_text(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits
