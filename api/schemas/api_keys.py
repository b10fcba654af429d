"""API keys on the wire, in the style of OpenAI's administration API: the whole key is in the answer that made it."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from core.db.models import ApiKeyRow
from core.domain.api_keys import DEFAULT_SCOPES, PREFIX, Scope, format_key_id
from core.domain.bounds import KEY_SECONDS
from core.services.api_keys import IssuedKey

KeyName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]


class ExpiresAfter(BaseModel):
    """A time of life, as files have it."""

    model_config = ConfigDict(extra="forbid")
    anchor: Literal["created_at"]
    seconds: Annotated[int, KEY_SECONDS.field]

    @property
    def lifetime(self) -> timedelta:
        return timedelta(seconds=self.seconds)


class CreateApiKey(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: KeyName
    # A scope named twice is no error.
    scopes: frozenset[Scope] = Field(default=DEFAULT_SCOPES, min_length=1, json_schema_extra={"uniqueItems": False})
    expires_after: ExpiresAfter | None = None

    @property
    def asked_scopes(self) -> frozenset[Scope] | None:
        """The scopes that were asked for: those of a request that names none depend on who makes the key."""
        return self.scopes if "scopes" in self.model_fields_set else None

    @property
    def lifetime(self) -> timedelta | None:
        return self.expires_after.lifetime if self.expires_after else None


class ApiKeyObject(BaseModel):
    id: str
    object: str = "organization.api_key"
    name: str
    scopes: list[Scope]
    redacted_value: str
    created_by: str | None
    created_at: int
    expires_at: int | None
    last_used_at: int | None

    @classmethod
    def of(cls, row: ApiKeyRow) -> ApiKeyObject:
        return cls(**_fields_of(row))


class IssuedApiKeyObject(ApiKeyObject):
    """A key just made. `value` is never shown again."""

    value: str

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
        "created_at": int(row.created_at.timestamp()),
        "expires_at": int(row.expires_at.timestamp()) if row.expires_at else None,
        "last_used_at": int(row.last_used_at.timestamp()) if row.last_used_at else None,
    }
