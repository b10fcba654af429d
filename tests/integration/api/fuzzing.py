"""Requests that schemathesis generates from the API's own document."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.environments import find_schemathesis

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "ignored_auth",
    "use_after_free",
)


def fuzz(api_url: str, api_key: str, cwd: Path, *options: str) -> None:
    """Send generated requests with a key and fail at a server error or an answer that the document lacks."""
    argv = [
        str(find_schemathesis()),
        "--no-color",
        "run",
        f"{api_url}/openapi.json",
        f"--header=Authorization: Bearer {api_key}",
        f"--checks={','.join(CHECKS)}",
        "--phases=examples,coverage,fuzzing,stateful",
        "--max-examples=10",
        "--seed=5",
        "--suppress-health-check=filter_too_much",
        "--request-timeout=120",
        "--generation-database=none",
        *options,
    ]
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    print(done.stdout[-1500:])
