"""`python -m api.openapi` prints the OpenAPI document. It needs no server: the addresses below are never used."""

from __future__ import annotations

import json
import sys

from pydantic import SecretStr

from api.main import create_app
from core.settings import ApiSettings


def render_document() -> str:
    """Return the document as it is kept in `openapi.json`."""
    settings = ApiSettings(
        database_url=SecretStr("postgresql://nowhere/none"),
        s3_endpoint="nowhere:1",
        s3_access_key="nobody",
        s3_secret_key=SecretStr("none"),
    )
    return json.dumps(create_app(settings).openapi(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render_document())
