"""A job's statuses, the pauses and limits of its attempts, and the name of its adapter."""

from __future__ import annotations

from enum import StrEnum


class JobStatus(StrEnum):
    """Where a job is in its life. OpenAI's API pauses jobs too, but has no name for `paused`.

    - `validating_files`: OpenAI's word for the check of the files. No job is ever in it here.
    - `queued`: The job waits for a worker.
    - `running`: A worker trains the job.
    - `paused`: The job holds no worker, and waits until it is resumed.
    - `succeeded`: The adapter is trained and stored. This is final.
    - `failed`: The job has ended with an error. This is final.
    - `cancelled`: The job was cancelled. This is final.
    """

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class AttemptOutcome(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    PAUSED = "paused"
    LOST = "lost"
    LENT = "lent"


TERMINAL_STATUSES = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)
UNFINISHED_STATUSES = tuple(status for status in JobStatus if status not in TERMINAL_STATUSES)

MAX_ATTEMPTS = 3
MAX_SUFFIX_LENGTH = 64
# Seconds before the second and the third attempt, long enough for a temporary fault to pass.
RETRY_DELAYS_SECONDS = (5.0, 30.0)
# This many attempts in a row may end uncounted without a new step. After that they count, so that every job ends.
MAX_UNCOUNTED = 20
# The longest pause before another attempt, after attempts that were not counted.
_LONGEST_DELAY_SECONDS = 600.0
# After this many deaths of a trainer with several jobs in it, a job of that trainer stays alone to its end.
MAX_SUSPICIONS = 3
# For this long a suspect waits for an idle worker before a busy worker gives its jobs back to take it.
SUSPECT_PATIENCE_SECONDS = 60.0
# A suspect must train this many steps alone, beyond the step of its trainer's death.
ACQUITTAL_STEPS = 10


def retry_delay_seconds(attempts_made: int, *, num_uncounted: int = 0) -> float:
    """Return the pause after this many attempts that count, and this many in a row that do not."""
    delay = RETRY_DELAYS_SECONDS[min(max(attempts_made, 1), len(RETRY_DELAYS_SECONDS)) - 1]
    return max(delay, min(RETRY_DELAYS_SECONDS[0] * 2.0 ** max(0, num_uncounted - 1), _LONGEST_DELAY_SECONDS))


def is_acquitted(step: int, *, suspect_step: int, num_suspicions: int) -> bool:
    """Say whether a job that is tried alone has passed the point at which its trainer died."""
    return step > suspect_step + ACQUITTAL_STEPS and num_suspicions < MAX_SUSPICIONS


def pool_name(base_model_id: str, quantization: str | None) -> str:
    """Return the pool, which is also the Celery queue, of a base model in one quantization."""
    return f"{base_model_id}@{quantization or 'none'}"


def fine_tuned_model_name(base_model_id: str, *, tenant_slug: str, suffix: str | None, digits: str) -> str:
    """Return `ft:<base>:<tenant>:<suffix>:<8 digits>`, as OpenAI names fine-tuned models."""
    return f"ft:{base_model_id}:{tenant_slug}:{suffix or ''}:{digits}"


def is_fine_tuned_model(model: str) -> bool:
    return model.startswith("ft:")


def is_checkpoint_model(model: str) -> bool:
    return is_fine_tuned_model(model) and ":ckpt-step-" in model


def checkpoint_model_name(fine_tuned_model: str, step: int) -> str:
    return f"{fine_tuned_model}:ckpt-step-{step}"
