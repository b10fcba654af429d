"""The minio client as we use it.

It never waits for ever: every request has our own timeouts and few retries. A server refuses what is signed many
minutes off: services sign with the database's time, not with their host's.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import threading
from collections.abc import Callable
from typing import Any

import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.credentials.providers import ChainedProvider, EnvAWSProvider, IamAwsProvider, Provider, StaticProvider
from minio.error import MinioException
from minio.time import to_amz_date

from core.settings import StorageConfig
from core.storage.objects import StorageUnavailableError

_AWS_REGION = re.compile(r"\.([a-z]{2}(?:-[a-z]+)+-\d)\.amazonaws\.com")
# A hung server holds a caller for two read timeouts, 30 s, at most; its Retry-After is not obeyed, it could say hours.
_RETRIES = urllib3.Retry(
    total=3,
    read=1,
    backoff_factor=0.2,
    backoff_jitter=0.2,
    status_forcelist=(500, 502, 503, 504),
    respect_retry_after_header=False,
)


def host_time() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class _TimedMinio(Minio):
    """Signs its requests with a time that it is given; minio itself takes the host's."""

    def __init__(self, *args: Any, now: Callable[[], dt.datetime], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._now = now

    def _build_headers(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dt.datetime]:
        headers, _host_time = super()._build_headers(*args, **kwargs)
        date = self._now()
        headers["x-amz-date"] = to_amz_date(date)
        return headers, date


def connect_client(
    config: StorageConfig, *, now: Callable[[], dt.datetime] = host_time, credentials: Provider | None = None
) -> Minio:
    """Return a client that waits seconds for the endpoint, not minutes. Without `credentials`, the configuration's."""
    client = _TimedMinio(
        config.endpoint,
        secure=config.secure,
        credentials=credentials or StoreCredentials(config),
        region=config.region or _region_in(config.endpoint),  # given, so that signing a URL needs no question
        http_client=_make_pool(config.ca_bundle),
        now=now,
    )
    if config.addressing == "virtual":
        client.enable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
    elif config.addressing == "path":
        client.disable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
    return client


def _region_in(endpoint: str) -> str:
    named = _AWS_REGION.search(endpoint)
    return named[1] if named else "us-east-1"


def _make_pool(ca_bundle: str | None) -> urllib3.PoolManager:
    return urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=2, read=15),
        retries=_RETRIES,
        maxsize=16,
        cert_reqs="CERT_REQUIRED",
        ca_certs=ca_bundle,
    )


def _find_role_endpoint() -> str | None:
    """Return where AWS's own clients would be told to ask for a role's keys; None for where AWS answers."""
    if "AWS_WEB_IDENTITY_TOKEN_FILE" in os.environ:
        return os.environ.get("AWS_ENDPOINT_URL_STS")
    if any(name.startswith("AWS_CONTAINER_CREDENTIALS_") for name in os.environ):
        return None
    return os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")


class StoreCredentials(Provider):
    """The keys of a configuration, or else those that the environment or the machine has, renewed as they expire."""

    def __init__(self, config: StorageConfig) -> None:
        if config.access_key is not None and config.secret_key is not None:
            self._source: Provider = StaticProvider(config.access_key, config.secret_key)
        else:
            role = IamAwsProvider(custom_endpoint=_find_role_endpoint(), http_client=_make_pool(config.ca_bundle))
            self._source = ChainedProvider([EnvAWSProvider(), role])
        self._asking = threading.Lock()

    def retrieve(self) -> Credentials:
        """Raises StorageUnavailableError where nobody has any."""
        with self._asking:
            try:
                return self._source.retrieve()
            except (ValueError, LookupError, OSError, MinioException, urllib3.exceptions.HTTPError) as error:
                raise StorageUnavailableError(
                    "There are no credentials for the object store: set its access key and secret key, or give this "
                    f"machine a role ({type(error).__name__})."
                ) from error
