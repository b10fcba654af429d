"""Identifiers: UUIDv7 inside, prefixed text on the wire. Always made by the server, never taken from a tenant."""

from __future__ import annotations

import datetime as dt
import uuid
from enum import StrEnum

import uuid_utils

from core.domain.errors import NotFoundError

_HEX_DIGITS = 32


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


def new_id() -> uuid.UUID:
    """Return a fresh UUIDv7 (RFC 9562): it sorts by the time it was made."""
    return uuid.UUID(int=uuid_utils.uuid7().int)


def first_id_at(instant: dt.datetime) -> uuid.UUID:
    """Return the least id that can have been made at an instant or later: ids are ranges of time, too."""
    return uuid.UUID(int=int(instant.timestamp() * 1000) << 80)


def format_id(kind: IdKind, value: uuid.UUID) -> str:
    return f"{kind}{value.hex}"


def parse_id(kind: IdKind, text: str, *, param: str | None = None) -> uuid.UUID:
    """Return the UUID in a wire id. A malformed id is an unknown one: NotFoundError."""
    digits = text.removeprefix(kind)
    if not text.startswith(kind) or len(digits) != _HEX_DIGITS or not set(digits) <= set("0123456789abcdef"):
        raise NotFoundError(f"No such object: {text[:100]!r}.", param=param)
    return uuid.UUID(digits)
