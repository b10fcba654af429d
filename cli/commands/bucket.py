"""`espalier bucket`: the bucket that every process of the service stores its objects in."""

from __future__ import annotations

import typer

from cli.owner import DEFAULT_DATA_DIR, DataDir
from cli.stores import find_storage
from core.storage import S3ObjectStore, StorageError

bucket = typer.Typer(no_args_is_help=True, help="The bucket of the service.")


@bucket.callback()
def _keep_subcommands() -> None:
    """Let typer know that there are commands below this one, however few."""


@bucket.command("create")
def create_bucket(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Make the bucket that ESPALIER_S3_BUCKET names, if it is not there yet."""
    config = find_storage(data_dir)
    try:
        was_made = S3ObjectStore(config).ensure_bucket()
    except (StorageError, ValueError) as error:
        print(f"{config.endpoint}: {error}")
        raise typer.Exit(1) from None
    print(f"Bucket {config.bucket} {'has been made' if was_made else 'is there'} at {config.endpoint}.")
