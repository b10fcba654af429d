"""The bounds of every number that an operator or a tenant sets, in a request, on the command line or in SQL.

Each bound is defined here once. Pydantic refuses a value outside by the field's name, and a CHECK refuses it by the
column's name, however it arrives. Within the bounds no arithmetic of the service overflows or underflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

_DAY_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Bounds:
    """The least and the greatest value. Infinity and NaN are outside; PostgreSQL sorts NaN after infinity."""

    least: float
    greatest: float

    @property
    def field(self) -> Any:
        """Return the annotation of a pydantic field."""
        return Field(ge=self.least, le=self.greatest)

    def check(self, column: str) -> str:
        """Return the condition of a CHECK on a column."""
        return f"{column} between {self.least} and {self.greatest}"


# Of a tenant. Decayed usage is in GPU-seconds.
WEIGHT = Bounds(0.01, 1000)
USAGE_SECONDS = Bounds(0, 1e12)
RUNNING_JOBS = Bounds(0, 10_000)
QUEUED_JOBS = Bounds(0, 10_000_000)
STORED_BYTES = Bounds(0, 2**53)
TRAINED_TOKENS = Bounds(0, 2**53)
GPU_SECONDS = Bounds(0, 1e9)
REQUESTS_PER_MINUTE = Bounds(1, 1_000_000)
# Ten years. A key that should live longer is made without an expiry.
MAX_KEY_DAYS = 3650
KEY_SECONDS = Bounds(60, MAX_KEY_DAYS * _DAY_SECONDS)

# Of a base model.
SEQ_LEN = Bounds(8, 2**24)
RANK = Bounds(1, 2**24)
SLOTS = Bounds(1, 1024)
TOKENS_PER_STEP = Bounds(8, 2**24)

# Of a file.
UPLOAD_BYTES = Bounds(1, 8 * 2**30)
FILE_SECONDS = Bounds(3600, 30 * _DAY_SECONDS)

# Of a job.
PRIORITY = Bounds(-100, 100)
EPOCHS = Bounds(1, 50)
BATCH_SIZE = Bounds(1, 256)
LEARNING_RATE = Bounds(1e-12, 1)
LEARNING_RATE_MULTIPLIER = Bounds(1e-6, 1000)
ALPHA = Bounds(1e-3, 1e6)
DROPOUT = Bounds(0, 0.95)
WARMUP_RATIO = Bounds(0, 1)
WEIGHT_DECAY = Bounds(0, 10)
GRAD_NORM = Bounds(1e-6, 1000)
SEED = Bounds(0, 2**31 - 1)
