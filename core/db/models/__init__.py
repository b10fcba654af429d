"""The tables, one file for each noun.

Every row that a tenant owns has a `tenant_id`, and composite foreign keys cannot refer to another tenant's row. SQL
itself guarantees what it can: legal statuses, a lease exactly while a job runs, one adapter for each job, one usage row
for each attempt, numbers within their bounds. Migrations put row-level security on every table that tenants own.

A row's class has the name of its noun. `Row` follows where another class has this name: `ApiKeyRow` beside ApiKey, the
key as its owner holds it (core.domain.api_keys), and `BaseModelRow` beside pydantic's `BaseModel`.

Rows are imported from this package, never from its files. Tables refer to each other by name only. If a file were not
imported, its table would be missing from the metadata: foreign keys could not be resolved, and Alembic would propose to
drop the table. Importing the package loads all files.
"""

from core.db.models.adapters import Adapter
from core.db.models.api_keys import ApiKeyRow, OperatorKey
from core.db.models.attempts import LEASE_TOKENS, Attempt
from core.db.models.audit import AuditEntry
from core.db.models.base_models import BaseModelRow, BaseTokenizer
from core.db.models.checkpoints import Checkpoint, CheckpointPermission
from core.db.models.duties import Leader, RetentionMark, SetAside
from core.db.models.events import Event, LogLine
from core.db.models.files import File
from core.db.models.idempotency import IdempotencyKey
from core.db.models.jobs import Job
from core.db.models.observations import Observation, ObservationBlock
from core.db.models.pools import Pool, Queue
from core.db.models.resume_points import ResumePoint
from core.db.models.tenants import StorageTotal, Tenant
from core.db.models.uploads import Upload, UploadPart
from core.db.models.usage import Usage
from core.db.models.workers import Worker

__all__ = [
    "LEASE_TOKENS",
    "Adapter",
    "ApiKeyRow",
    "Attempt",
    "AuditEntry",
    "BaseModelRow",
    "BaseTokenizer",
    "Checkpoint",
    "CheckpointPermission",
    "Event",
    "File",
    "IdempotencyKey",
    "Job",
    "Leader",
    "LogLine",
    "Observation",
    "ObservationBlock",
    "OperatorKey",
    "Pool",
    "Queue",
    "ResumePoint",
    "RetentionMark",
    "SetAside",
    "StorageTotal",
    "Tenant",
    "Upload",
    "UploadPart",
    "Usage",
    "Worker",
]
