"""Uploads: files that are sent in parts. Also what files and uploads have in common: a purpose and an expiry."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, WithJsonSchema

from api.schemas.openai.files import FileObject
from api.schemas.openai.job_requests import Text
from api.schemas.wire import Answer, RequestBody, unix_seconds
from core.db.models import File, Upload, UploadPart
from core.domain.bounds import FILE_SECONDS, UPLOAD_BYTES
from core.domain.errors import InvalidRequestError
from core.domain.ids import IdKind, format_id

MAX_PART_BYTES = 64 * 2**20
MIN_SECONDS, MAX_SECONDS = int(FILE_SECONDS.least), int(FILE_SECONDS.greatest)
ShortText = Annotated[Text, StringConstraints(min_length=1, max_length=255)]


class FileExpiresAfter(RequestBody):
    """When the file is deleted by itself."""

    anchor: Literal["created_at"]
    """The instant from which the seconds count: always `created_at`, when the file is made."""
    seconds: Annotated[int, FILE_SECONDS.field]
    """The file's lifetime in seconds, from an hour to 30 days."""


class CreateUpload(RequestBody):
    """What a new upload will hold."""

    bytes: Annotated[int, UPLOAD_BYTES.field]
    """The size of the whole file in bytes. At most 8 GiB."""
    filename: ShortText
    """The file's name."""
    mime_type: ShortText
    """The file's media type, such as `application/jsonl`. It is kept and not checked."""
    purpose: Annotated[ShortText, WithJsonSchema({"type": "string", "enum": ["fine-tune"]})]
    """What the file is for: `fine-tune` only."""
    expires_after: FileExpiresAfter | None = None
    """When the file is deleted by itself. Null or absent for a file that stays."""


class CompleteUpload(RequestBody):
    """The parts of which the file is made."""

    part_ids: list[ShortText] = Field(min_length=1, max_length=10_000)
    """The ids of all parts, in the order of the file."""
    md5: Annotated[str, StringConstraints(pattern="^[0-9a-fA-F]{32}$")] | None = None
    """The MD5 of the whole file in hexadecimal digits. If given, a file that differs is refused."""


class UploadObject(Answer):
    """A file that is uploaded in parts."""

    id: str
    """The upload's id, which begins with `upload_`."""
    object: Literal["upload"] = "upload"
    """The kind of this object."""
    bytes: int
    """The size that the file will have, in bytes."""
    created_at: int
    """When the upload was begun, in Unix seconds."""
    expires_at: int
    """When a pending upload expires, in Unix seconds."""
    filename: str
    """The file's name."""
    purpose: Literal["fine-tune"]
    """What the file is for."""
    mime_type: str
    """Ours. The media type that the request named."""
    status: Literal["pending", "completing", "completed", "cancelled", "expired"]
    """Where the upload is in its life.

    - `pending`: It takes parts.
    - `completing`: Ours. Its parts are being put together.
    - `completed`: It has become a file.
    - `cancelled`: It was cancelled, and becomes no file.
    - `expired`: It was still pending at `expires_at`, and becomes no file.
    """
    file: FileObject | None
    """The file that the upload has become. Null until the upload is completed."""

    @classmethod
    def of(cls, row: Upload, *, now: dt.datetime, file: File | None = None) -> UploadObject:
        is_expired = row.status == "pending" and row.expires_at <= now
        return cls(
            id=format_id(IdKind.UPLOAD, row.id),
            bytes=row.size_bytes,
            created_at=unix_seconds(row.created_at),
            expires_at=unix_seconds(row.expires_at),
            filename=row.filename,
            purpose=row.purpose,
            mime_type=row.mime_type,
            status="expired" if is_expired else row.status,
            file=FileObject.of(file) if file else None,
        )


class PartObject(Answer):
    """One part of an upload."""

    id: str
    """The part's id, which begins with `part_`. Completing the upload needs it."""
    object: Literal["upload.part"] = "upload.part"
    """The kind of this object."""
    created_at: int
    """When the part was stored, in Unix seconds."""
    upload_id: str
    """The id of the upload that the part belongs to."""

    @classmethod
    def of(cls, row: UploadPart) -> PartObject:
        return cls(
            id=format_id(IdKind.PART, row.id),
            created_at=unix_seconds(row.created_at),
            upload_id=format_id(IdKind.UPLOAD, row.upload_id),
        )


def require_trainable(purpose: str | None) -> None:
    if purpose != "fine-tune":
        raise InvalidRequestError("This service takes files of purpose 'fine-tune' only.", param="purpose")


def read_lifetime(form: Mapping[str, str]) -> timedelta | None:
    """Return the lifetime in `expires_after[anchor]` and `expires_after[seconds]`, or None without them."""
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequestError("`expires_after[anchor]` is 'created_at'.", param="expires_after.anchor")
    is_number = (
        seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) <= len(str(MAX_SECONDS))
    )
    if not is_number or not MIN_SECONDS <= int(seconds or 0) <= MAX_SECONDS:
        raise InvalidRequestError(
            f"`expires_after[seconds]` is a whole number from {MIN_SECONDS} to {MAX_SECONDS}.",
            param="expires_after.seconds",
        )
    return timedelta(seconds=int(seconds or 0))
