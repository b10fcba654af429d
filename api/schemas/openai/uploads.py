"""Uploads on the wire, and what files and uploads have in common: a purpose, and a time after which they go."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from api.schemas.openai.job_requests import Text
from api.schemas.openai.jobs import FileObject
from core.db.models import File, Upload, UploadPart
from core.domain.bounds import FILE_SECONDS, UPLOAD_BYTES
from core.domain.errors import InvalidRequestError
from core.domain.ids import IdKind, format_id

MAX_PART_BYTES = 64 * 2**20
MIN_SECONDS, MAX_SECONDS = int(FILE_SECONDS.least), int(FILE_SECONDS.greatest)
ShortText = Annotated[Text, StringConstraints(min_length=1, max_length=255)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FileExpiresAfter(_Body):
    anchor: Literal["created_at"]
    seconds: Annotated[int, FILE_SECONDS.field]


class CreateUpload(_Body):
    bytes: Annotated[int, UPLOAD_BYTES.field]
    filename: ShortText
    mime_type: ShortText
    purpose: ShortText
    expires_after: FileExpiresAfter | None = None


class CompleteUpload(_Body):
    part_ids: list[ShortText] = Field(min_length=1, max_length=10_000)
    md5: Annotated[str, StringConstraints(pattern="^[0-9a-fA-F]{32}$")] | None = None


class UploadObject(BaseModel):
    id: str
    object: str = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    mime_type: str
    status: str
    file: FileObject | None

    @classmethod
    def of(cls, row: Upload, *, now: dt.datetime, file: File | None = None) -> UploadObject:
        is_expired = row.status == "pending" and row.expires_at <= now
        return cls(
            id=format_id(IdKind.UPLOAD, row.id),
            bytes=row.size_bytes,
            created_at=int(row.created_at.timestamp()),
            expires_at=int(row.expires_at.timestamp()),
            filename=row.filename,
            purpose=row.purpose,
            mime_type=row.mime_type,
            status="expired" if is_expired else row.status,
            file=FileObject.of(file) if file else None,
        )


class PartObject(BaseModel):
    id: str
    object: str = "upload.part"
    created_at: int
    upload_id: str

    @classmethod
    def of(cls, row: UploadPart) -> PartObject:
        return cls(
            id=format_id(IdKind.PART, row.id),
            created_at=int(row.created_at.timestamp()),
            upload_id=format_id(IdKind.UPLOAD, row.upload_id),
        )


def require_trainable(purpose: str | None) -> None:
    if purpose != "fine-tune":
        raise InvalidRequestError("This service takes files of purpose 'fine-tune' only.", param="purpose")


def read_lifetime(form: Mapping[str, str]) -> timedelta | None:
    """Return what the fields `expires_after[anchor]` and `expires_after[seconds]` say, or None without them."""
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
