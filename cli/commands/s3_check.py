"""`espalier s3-check`: checks that an S3 server does what the service needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated
from urllib.parse import urlsplit

import typer

from cli.environment import reading_settings
from cli.output import fail, say
from cli.s3_checks import CheckResult, run_s3_checks
from core.settings import S3Settings, StorageConfig

_FAILED, _CANNOT_SAY = 1, 2


def s3_check(
    url: Annotated[str, typer.Argument(help="http://HOST:PORT or https://HOST, and /BUCKET if it is another.")],
) -> None:
    """Try an S3 server with the keys, the region and the other ESPALIER_S3_... settings, one line a check.

    Exit code 0: the service can use it; 1: it cannot; 2: the address or the keys are missing or wrong.
    """
    results = []
    for result in run_s3_checks(_parse(url)):
        say(_as_line(result), **asdict(result))
        results.append(result)
    failed = [result.name for result in results if result.is_needed and not result.is_ok]
    if failed:
        fail(f"The service cannot use this server: {', '.join(failed)}.", exit_code=_FAILED)
    say("The service can use this server.")


def _parse(url: str) -> StorageConfig:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc or "@" in parts.netloc:
        fail("The URL is http://HOST:PORT or https://HOST, without keys in it.", exit_code=_CANNOT_SAY)
    bucket = parts.path.strip("/")
    given = {"s3_endpoint": f"{parts.scheme}://{parts.netloc}"} | ({"s3_bucket": bucket} if bucket else {})
    with reading_settings():
        return S3Settings.model_validate(given).storage_config


def _as_line(result: CheckResult) -> str:
    verdict = "ok    " if result.is_ok else "FAILED" if result.is_needed else "lacks "
    suffix = "" if result.is_ok or result.is_needed else " (not needed by this version)"
    return f"{verdict}  {result.name:15} {result.says}{suffix}"
