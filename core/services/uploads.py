"""Uploads: files that arrive in parts, in any order, and become one file when they are completed.

A part is stored as an object of its own while it arrives, so it is never held in memory. Its row is added once the
object is whole. Every change locks the upload's row, so no part is added to an upload that has ended.

| status | a part, a completion or a cancellation |
|---|---|
| `pending` | is accepted |
| `pending`, but past `expires_at` | ConflictError |
| `completing` | BusyError |
| `completing`, but past `completing_until` | is accepted: the process that completed it has died |
| `completed`, `cancelled` | ConflictError |

A completion takes as long as a copy of the file. The process that completes an upload holds it in the status
`completing`, and extends `completing_until` by COMPLETION_LEASE again and again.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from sqlalchemy import Update, and_, func, or_, select, update

from core.db.models import File, Upload, UploadPart
from core.db.session import TenantSession
from core.domain.errors import BusyError, ConflictError, InvalidRequestError, PayloadTooLargeError
from core.domain.files import NewFile
from core.domain.ids import IdKind, new_id, not_found
from core.services.files import create_file

UPLOAD_LIFETIME = timedelta(hours=1)
COMPLETION_LEASE = timedelta(minutes=2)
UNKNOWN_PART = "`part_ids` names a part twice, or one that is not there."
MAX_PARTS = 10_000


@dataclass(frozen=True)
class NewUpload:
    """What a client says about a file before sending it. Completion refuses another size than `size_bytes`."""

    filename: str
    purpose: str
    mime_type: str
    size_bytes: int
    file_lifetime: timedelta | None = None


@dataclass(frozen=True)
class NewPart:
    id: uuid.UUID
    object_key: str
    size_bytes: int


@dataclass(frozen=True)
class Completion:
    """A hold on an upload for its completion. `until` is the fence: a later holder has a later one."""

    upload_id: uuid.UUID
    until: dt.datetime
    part_keys: tuple[str, ...]


def create_upload(session: TenantSession, tenant_id: uuid.UUID, *, new: NewUpload) -> Upload:
    row = Upload(
        id=new_id(),
        tenant_id=tenant_id,
        filename=new.filename,
        purpose=new.purpose,
        mime_type=new.mime_type,
        size_bytes=new.size_bytes,
        file_lifetime_seconds=None if new.file_lifetime is None else int(new.file_lifetime.total_seconds()),
        expires_at=func.now() + UPLOAD_LIFETIME,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def get_upload(session: TenantSession, tenant_id: uuid.UUID, *, upload_id: uuid.UUID) -> Upload:
    row = session.scalar(select(Upload).where(Upload.tenant_id == tenant_id, Upload.id == upload_id))
    if row is None:
        raise not_found(IdKind.UPLOAD, upload_id)
    return row


def find_file(session: TenantSession, upload: Upload) -> File | None:
    """Return the file that an upload has become, even if it was deleted since."""
    query = select(File).where(File.tenant_id == upload.tenant_id, File.id == upload.file_id)
    return session.scalar(query) if upload.file_id else None


def require_pending(session: TenantSession, tenant_id: uuid.UUID, *, upload_id: uuid.UUID) -> Upload:
    """Return an upload that may be changed, with its row locked. Raises NotFoundError, ConflictError or BusyError."""
    is_abandoned = and_(Upload.status == "completing", Upload.completing_until < func.now())
    row = session.scalar(
        select(Upload)
        .where(
            Upload.tenant_id == tenant_id,
            Upload.id == upload_id,
            or_(Upload.status == "pending", is_abandoned),
            Upload.expires_at > func.now(),
        )
        .with_for_update()
    )
    if row is None:
        upload = get_upload(session, tenant_id, upload_id=upload_id)
        session.refresh(upload)  # the row may have changed while this waited for the lock
        status = upload.status
        if status == "completing":
            raise BusyError("The upload is being completed; ask again.", code="upload_completing")
        shown = "expired" if status == "pending" else status
        raise ConflictError(f"The upload is {shown}; only a pending one can be changed.", code="upload_not_pending")
    return row


def add_part(session: TenantSession, tenant_id: uuid.UUID, *, upload_id: uuid.UUID, new: NewPart) -> UploadPart:
    """Add a part whose object is stored. Raises PayloadTooLargeError for more bytes or parts than allowed."""
    upload = require_pending(session, tenant_id, upload_id=upload_id)
    parts = select(func.count(), func.coalesce(func.sum(UploadPart.size_bytes), 0)).where(
        UploadPart.tenant_id == tenant_id, UploadPart.upload_id == upload_id
    )
    num_parts, num_bytes = session.execute(parts).one()
    if num_bytes + new.size_bytes > upload.size_bytes:
        raise PayloadTooLargeError(
            f"The parts hold more than the {upload.size_bytes} bytes of the upload.", param="data"
        )
    if num_parts >= MAX_PARTS:
        raise PayloadTooLargeError(f"An upload has at most {MAX_PARTS} parts.", param="data")
    row = UploadPart(
        id=new.id, tenant_id=tenant_id, upload_id=upload_id, object_key=new.object_key, size_bytes=new.size_bytes
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def begin_completion(
    session: TenantSession, tenant_id: uuid.UUID, *, upload_id: uuid.UUID, part_ids: Sequence[uuid.UUID]
) -> Completion:
    """Hold an upload for completion. Raises InvalidRequestError if the parts do not have the promised size."""
    upload = require_pending(session, tenant_id, upload_id=upload_id)
    parts = _order_parts(session, upload, part_ids)
    until = session.scalars(select(func.now() + COMPLETION_LEASE)).one()
    upload.status, upload.completing_until = "completing", until
    upload.expires_at = max(upload.expires_at, until)
    session.flush()
    return Completion(upload_id, until, tuple(part.object_key for part in parts))


def extend_completion(session: TenantSession, tenant_id: uuid.UUID, completion: Completion) -> Completion:
    """Extend the hold on an upload. Raises BusyError if another holder has taken it."""
    until = func.now() + COMPLETION_LEASE
    values = {"completing_until": until, "expires_at": func.greatest(Upload.expires_at, until)}
    extended = session.scalar(_held(tenant_id, completion).values(values).returning(Upload.completing_until))
    if extended is None:
        raise _taken()
    return replace(completion, until=extended)


def abandon_completion(session: TenantSession, tenant_id: uuid.UUID, completion: Completion) -> None:
    """Make an upload pending again, unless another holder has taken it."""
    session.execute(_held(tenant_id, completion).values(status="pending", completing_until=None))


def complete_upload(session: TenantSession, tenant_id: uuid.UUID, completion: Completion, *, file: NewFile) -> Upload:
    """Turn an upload into the file composed of its parts. Raises BusyError if another holder has taken it."""
    row = create_file(session, tenant_id, new=file)
    values = {"status": "completed", "completing_until": None, "file_id": row.id}
    upload: Upload | None = session.scalar(_held(tenant_id, completion).values(values).returning(Upload))
    if upload is None:
        raise _taken()
    return upload


def cancel_upload(session: TenantSession, tenant_id: uuid.UUID, *, upload_id: uuid.UUID) -> Upload:
    upload = require_pending(session, tenant_id, upload_id=upload_id)
    upload.status, upload.completing_until = "cancelled", None
    session.flush()
    return upload


def _order_parts(session: TenantSession, upload: Upload, part_ids: Sequence[uuid.UUID]) -> tuple[UploadPart, ...]:
    """Return the named parts in their order."""
    query = select(UploadPart).where(UploadPart.tenant_id == upload.tenant_id, UploadPart.upload_id == upload.id)
    known = {row.id: row for row in session.scalars(query)}
    if len(set(part_ids)) < len(part_ids) or not known.keys() >= set(part_ids):
        raise InvalidRequestError(UNKNOWN_PART, param="part_ids")
    parts = tuple(known[part_id] for part_id in part_ids)
    num_bytes = sum(part.size_bytes for part in parts)
    if num_bytes != upload.size_bytes:
        raise InvalidRequestError(
            f"The parts hold {num_bytes} bytes; the upload was to have {upload.size_bytes}.",
            code="upload_size_mismatch",
            param="part_ids",
        )
    return parts


def _held(tenant_id: uuid.UUID, completion: Completion) -> Update:
    """Return the start of an update of an upload that this completion still holds."""
    return (
        update(Upload)
        .where(
            Upload.tenant_id == tenant_id,
            Upload.id == completion.upload_id,
            Upload.status == "completing",
            Upload.completing_until == completion.until,
        )
        .execution_options(synchronize_session=False)
    )


def _taken() -> BusyError:
    return BusyError("The upload took too long, and another request completes it.", code="upload_completing")
