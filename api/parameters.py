"""The parameters that several routes share, each described once."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path, Query

JobId = Annotated[str, Path(description="The job's id, which begins with `ftjob-`.")]
FileId = Annotated[str, Path(description="The file's id, which begins with `file-`.")]
UploadId = Annotated[str, Path(description="The upload's id, which begins with `upload_`.")]
AdapterId = Annotated[str, Path(description="The adapter's id, which begins with `adapter-`.")]
PermissionId = Annotated[str, Path(description="The permission's id, which begins with `cp_`.")]
KeyId = Annotated[str, Path(description="The API key's id, which begins with `key_`.")]
TenantSlug = Annotated[str, Path(description="The tenant's slug.")]
PoolName = Annotated[str, Path(description="The pool's name, such as `acme/base@nf4`. Its slashes need no escaping.")]
BaseModelId = Annotated[str, Path(description="The base model's name. Its slashes need no escaping.")]
ModelName = Annotated[
    str, Path(description="The name of a base model, a fine-tuned model or a checkpoint. Its slashes need no escaping.")
]
CheckpointName = Annotated[
    str, Path(description="The checkpoint's model name, which ends in `:ckpt-step-<step>`. Slashes need no escaping.")
]
WithChildren = Annotated[bool, Query(description="Whether to end the keys too that were made with this one.")]
OfTenant = Annotated[str | None, Query(description="Show what is of this tenant only, by its slug.")]
After = Annotated[
    str | None, Query(description="The `last_id` of the page before: the answer begins behind it. Absent at first.")
]


def page_limit(most: int) -> Any:
    """Return the bounds of a `limit`."""
    return Query(ge=1, le=most, description="How many objects the answer may hold.")
