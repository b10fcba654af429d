"""The tables, one file a noun. Every tenant-owned row carries `tenant_id`; composite keys keep to one tenant.

What SQL can promise, SQL promises: legal statuses, a lease exactly while running, one adapter a job, one usage row an
attempt, numbers within their bounds. Row-level security on every tenant-owned table stands in the migrations.

A row's class is called by its noun alone. `Row` follows where the noun is already something else's name: `ApiKeyRow`
beside the key in its owner's hand (core.domain.api_keys), `BaseModelRow` beside pydantic's `BaseModel`.

Rows are imported from this package, never from its files. Tables refer to each other by name only, and a file that
nobody has imported would be missing from the metadata: foreign keys could not be resolved, and Alembic would take the
table for one to drop. Importing the package loads them all.
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
