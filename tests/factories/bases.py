"""The base model that every test database knows, and its entry in a registry. Its weights are in tiny_bases.py."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine

from core.db.session import service_transaction
from core.domain.bases import BaseModelEntry, BaseModelSource
from core.domain.jobs import pool_name
from core.domain.objects import tokenizer_key
from core.services.base_models import record_tokenizer
from core.storage import S3ObjectStore
from local.servers import ServerAddresses

BASE_MODEL = "acme-labs/tiny-base"
POOL = pool_name(BASE_MODEL, None)
NF4_POOL = pool_name(BASE_MODEL, "nf4")
# What an operator's registry file says of it.
REGISTRY = {
    "base_models": [
        {
            "id": BASE_MODEL,
            "source": {"kind": "path", "location": "/nowhere"},
            "quantizations": ["nf4"],
            "target_modules": ["q_proj", "v_proj"],
            "max_seq_len": 256,
        }
    ]
}


def make_entry(directory: Path, *, slots: int = 8, dtype: str = "float32") -> BaseModelEntry:
    return BaseModelEntry.model_validate(
        {
            "id": BASE_MODEL,
            "source": BaseModelSource(kind="path", location=str(directory)),
            "quantizations": ("nf4",),
            "target_modules": ("q_proj", "v_proj"),
            "max_seq_len": 256,
            "slots": slots,
            "dtype": dtype,
        }
    )


def publish_tokenizer(owner: Engine, servers: ServerAddresses, bundle: str, *, sha256: str) -> None:
    """Store the base's tokenizer as the worker does that has loaded the base."""
    key = tokenizer_key(sha256)
    S3ObjectStore(servers.storage).put_bytes(key, bundle.encode(), content_type="application/json")
    with service_transaction(owner) as session:
        record_tokenizer(session, BASE_MODEL, object_key=key)
