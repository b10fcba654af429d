"""API keys, in the style of OpenAI's administration API. Only the answer that made a key shows it whole."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from api.schemas.wire import Answer, RequestBody, optional_seconds, unix_seconds
from core.db.models import ApiKeyRow
from core.domain.api_keys import DEFAULT_SCOPES, PREFIX, Scope, format_key_id
from core.domain.bounds import KEY_SECONDS
from core.services.api_keys import IssuedKey

KeyName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]


class ApiKeyExpiresAfter(RequestBody):
    """When the key stops working by itself."""

    anchor: Literal["created_at"]
    """The instant from which the seconds count: always `created_at`, when the key is made."""
    seconds: Annotated[int, KEY_SECONDS.field]
    """The key's lifetime in seconds, from a minute to ten years."""

    @property
    def lifetime(self) -> timedelta:
        return timedelta(seconds=self.seconds)


class CreateApiKey(RequestBody):
    """The key to make."""

    name: KeyName
    """What the key is called. Two live keys may share a name, so that a new one can be rolled out."""
    # A scope named twice is no error.
    scopes: frozenset[Scope] = Field(default=DEFAULT_SCOPES, min_length=1, json_schema_extra={"uniqueItems": False})
    """What the key may do, at most what its maker may. Absent for all that its maker may but `admin`."""
    expires_after: ApiKeyExpiresAfter | None = None
    """When the key stops working by itself. Null or absent for the lifetime of the key that makes it."""

    @property
    def asked_scopes(self) -> frozenset[Scope] | None:
        """The scopes that the request names. None if it names none: then they depend on the maker of the key."""
        return self.scopes if "scopes" in self.model_fields_set else None

    @property
    def lifetime(self) -> timedelta | None:
        return self.expires_after.lifetime if self.expires_after else None


class ApiKeyObject(Answer):
    """An API key, without its secret."""

    id: str
    """The key's id, which begins with `key_`."""
    object: Literal["organization.api_key"] = "organization.api_key"
    """The kind of this object."""
    name: str
    """What the key is called."""
    scopes: list[Scope]
    """What the key may do."""
    redacted_value: str
    """The public part of the key itself, by which its owner recognises it."""
    created_by: str | None
    """The id of the key that made this one. Null if an operator made it."""
    created_at: int
    """When the key was made, in Unix seconds."""
    expires_at: int | None
    """When the key stops working, in Unix seconds. Null if it does not."""
    last_used_at: int | None
    """When the key was last seen in use, in Unix seconds. Null if it never was."""

    @classmethod
    def of(cls, row: ApiKeyRow) -> ApiKeyObject:
        return cls(**_fields_of(row))


class IssuedApiKeyObject(ApiKeyObject):
    """An API key that was just made."""

    value: str
    """The whole key. No other answer shows it."""

    @classmethod
    def of_issued(cls, issued: IssuedKey) -> IssuedApiKeyObject:
        return cls(**_fields_of(issued.row), value=str(issued.api_key))


def _fields_of(row: ApiKeyRow) -> dict[str, object]:
    return {
        "id": format_key_id(row.key_id),
        "name": row.name,
        "scopes": sorted(row.scopes),
        "redacted_value": f"{PREFIX}_{row.key_id}_...",
        "created_by": format_key_id(row.created_by) if row.created_by else None,
        "created_at": unix_seconds(row.created_at),
        "expires_at": optional_seconds(row.expires_at),
        "last_used_at": optional_seconds(row.last_used_at),
    }
