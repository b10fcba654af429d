"""Identifiers: UUIDv7 inside, prefixed text on the wire. The server always makes them, never a tenant."""

from __future__ import annotations

import datetime as dt
import uuid
from enum import StrEnum

import uuid_utils

from core.domain.errors import NotFoundError

_HEX_DIGITS = 32
_MAX_SHOWN_CHARACTERS = 100


class IdKind(StrEnum):
    """The prefix of each kind of wire id."""

    FILE = "file-"
    JOB = "ftjob-"
    EVENT = "ftevent-"
    LOG_LINE = "ftlog-"
    CHECKPOINT = "ftckpt_"
    ADAPTER = "adapter-"
    TENANT = "org-"
    UPLOAD = "upload_"
    PART = "part_"
    PERMISSION = "cp_"


# The error for an id that names nothing, whatever its form, in OpenAI's words where OpenAI has any.
_NOT_FOUND = {
    IdKind.FILE: "No such File object: {}",
    IdKind.JOB: "Could not find fine tune: {}",
    IdKind.EVENT: "No such event to continue after: {}",
    IdKind.LOG_LINE: "No such log line to continue after: {}",
    IdKind.CHECKPOINT: "No such checkpoint: {}",
    IdKind.ADAPTER: "No such adapter: {}",
    IdKind.UPLOAD: "No such Upload object: {}",
    IdKind.PART: "No such part: {}",
    IdKind.PERMISSION: "No such permission: {}",
}


def new_id() -> uuid.UUID:
    """Return a new UUIDv7 (RFC 9562). Such ids sort by the time they were made."""
    return uuid.UUID(int=uuid_utils.uuid7().int)


def first_id_at(instant: dt.datetime) -> uuid.UUID:
    """Return the least id that can be made at this instant or later, so that ids can be queried by time."""
    return uuid.UUID(int=int(instant.timestamp() * 1000) << 80)


def format_id(kind: IdKind, value: uuid.UUID) -> str:
    return f"{kind}{value.hex}"


def parse_id(kind: IdKind, text: str, *, param: str | None = None) -> uuid.UUID:
    """Return the UUID in a wire id. Raises NotFoundError for a malformed id, in the words for an unknown one."""
    digits = text.removeprefix(kind)
    if not text.startswith(kind) or len(digits) != _HEX_DIGITS or not set(digits) <= set("0123456789abcdef"):
        raise not_found(kind, text, param=param)
    return uuid.UUID(digits)


def not_found(kind: IdKind, shown: str | uuid.UUID, *, param: str | None = None) -> NotFoundError:
    """Return the error for a wire id, or the UUID in one, that names nothing of this tenant."""
    text = format_id(kind, shown) if isinstance(shown, uuid.UUID) else shown[:_MAX_SHOWN_CHARACTERS]
    return NotFoundError(_NOT_FOUND.get(kind, "No such object: {}").format(text or '""'), param=param)
