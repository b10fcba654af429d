"""Files: the datasets that a tenant has uploaded, and the result files of its jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import with_config
from typing_extensions import TypedDict

from api.schemas.wire import STORED, Answer, AsStored, optional_seconds, unix_seconds
from core.db.models import File
from core.domain.ids import IdKind, format_id


@with_config(STORED)
class RowProblem(TypedDict):
    """One thing that is wrong with one row of a dataset."""

    line: int
    """The line in the file. The first line is 1."""
    path: str
    """The place in the row, such as `messages[1].role`, or the column where the line stops being JSON. May be empty."""
    code: str
    """The kind of problem, a stable word for programs, such as `not_json`.

    The list of error codes is in docs/errors.md and may grow.
    """
    message: str
    """What is wrong, for people."""
    hint: str
    """What to change."""


@with_config(STORED)
class FileValidation(TypedDict, total=False):
    """What the check of a dataset counted. A result file was not checked, so its object is empty."""

    num_problems: int
    """The number of problems found."""
    problem_counts: dict[str, int]
    """The number of problems by `code`, which the list of error codes in docs/errors.md names."""
    is_complete: bool
    """False if the check stopped early: the file has very many problems, or another format."""
    num_duplicates: int
    """The number of rows that repeat an earlier row letter by letter, among the rows that were compared."""
    num_compared: int
    """The number of rows that were compared with one another."""


class FileSummary(Answer):
    """A file as a list shows it. `validation` counts the problems; the file itself shows them row by row."""

    id: str
    """The file's id, which begins with `file-`."""
    object: Literal["file"] = "file"
    """The kind of this object."""
    bytes: int
    """The file's size in bytes."""
    created_at: int
    """When the file was uploaded, in Unix seconds."""
    expires_at: int | None
    """When the file is deleted, in Unix seconds. Null if it does not expire."""
    filename: str
    """The name that the file was uploaded under."""
    purpose: Literal["fine-tune", "fine-tune-results"]
    """`fine-tune` for an uploaded dataset, `fine-tune-results` for the step metrics of a job as CSV."""
    status: Literal["processed", "error"]
    """What the check of the file found.

    - `processed`: No problem. A result file is not checked, and has this status too.
    - `error`: The file has rows that cannot be trained on. A job refuses such a file.
    """
    status_details: str | None
    """The first problem in one sentence. Null if `status` is `processed`."""
    num_examples: int
    """Ours. The number of rows that can be trained on."""
    sha256: str
    """Ours. The SHA-256 of the file's bytes, in hexadecimal digits."""
    validation: Annotated[FileValidation, AsStored()]
    """Ours. What the check of the rows counted."""

    @classmethod
    def of(cls, row: File) -> FileSummary:
        return cls(**_describe_file(row))


class FileObject(FileSummary):
    """A file, with the problems of its rows."""

    problems: list[Annotated[RowProblem, AsStored()]]
    """Ours. The first 100 problems. `validation.num_problems` counts all of them."""

    @classmethod
    def of(cls, row: File) -> FileObject:
        return cls(**_describe_file(row), problems=row.problems)


def _describe_file(row: File) -> dict[str, Any]:
    return {
        "id": format_id(IdKind.FILE, row.id),
        "bytes": row.size_bytes,
        "created_at": unix_seconds(row.created_at),
        "expires_at": optional_seconds(row.expires_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": row.status,
        "status_details": row.status_details,
        "num_examples": row.num_examples,
        "sha256": row.sha256,
        "validation": row.report,
    }
