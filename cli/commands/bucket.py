"""`espalier bucket`: the bucket in which all processes of the service store their objects."""

from __future__ import annotations

import time
import uuid
from typing import Annotated

import typer

from cli.output import fail, say
from cli.owner import DEFAULT_DATA_DIR, DataDir
from cli.stores import find_storage
from core.domain.objects import tenant_prefix
from core.storage import S3ObjectStore, StorageError

_PAUSE_SECONDS = 0.5
bucket = typer.Typer(no_args_is_help=True, help="The bucket of the service.")


@bucket.callback()
def _keep_subcommands() -> None:
    """Tell typer that this is a group of commands, although it has only one."""


@bucket.command("create")
def create_bucket(
    wait: Annotated[int, typer.Option(min=0, help="Seconds to wait for a server that does not answer yet.")] = 0,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Make the bucket that ESPALIER_S3_BUCKET names, if it is not there yet, and see that it takes an object."""
    config = find_storage(data_dir)
    deadline = time.monotonic() + wait
    while True:
        try:
            was_made = _make_and_try(S3ObjectStore(config))
            break
        except (StorageError, ValueError) as error:
            if time.monotonic() >= deadline:
                fail(f"{config.endpoint}: {error}")
            time.sleep(_PAUSE_SECONDS)
    found = "has been made" if was_made else "is there"
    sentence = f"Bucket {config.bucket} {found} at {config.endpoint}."
    say(sentence, bucket=config.bucket, endpoint=config.endpoint, was_made=was_made)


def _make_and_try(store: S3ObjectStore) -> bool:
    """Make the bucket, and store an object in it as a test: some servers make buckets before they can store objects."""
    was_made = store.ensure_bucket()
    probe = tenant_prefix(uuid.uuid4()) + "probe"
    store.put_bytes(probe, b"ready?", content_type="text/plain")
    store.delete(probe)
    return was_made
