"""Failures: why an attempt or a job ended badly, in the words that its tenant reads."""

from __future__ import annotations

from core.domain.jobs import MAX_UNCOUNTED
from core.domain.values import Frozen


class Failure(Frozen):
    """`code` is public and stable. `message` is a sentence that a tenant understands.

    `param` is the field of the submission that names the file at fault, if there is one.
    """

    code: str
    message: str
    param: str | None = None


WORKER_LOST = Failure(code="worker_lost", message="The worker was lost while it trained this job.")
LEASE_LOST = Failure(code="lease_lost", message="The worker lost touch with the database and stopped itself.")
NO_PROGRESS = Failure(
    code="no_progress",
    message=f"The job was interrupted more than {MAX_UNCOUNTED} times in a row and came to no new step.",
)
