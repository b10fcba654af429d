"""Constants of the stored objects, and their size and hash."""

from __future__ import annotations

import hashlib
from datetime import timedelta

from core.storage import (
    StoredObject,
)

MINUTE = timedelta(minutes=1)
TYPE = "application/octet-stream"


def describe(body: bytes) -> StoredObject:
    return StoredObject(size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
