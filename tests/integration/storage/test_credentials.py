"""The sources of the store's credentials, and the error where there are none."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, urlsplit

import pytest

from core.settings import StorageConfig
from core.storage import (
    S3ObjectStore,
    StorageUnavailableError,
)
from tests.integration.storage.objects import MINUTE, TYPE, describe


def test_a_wrong_secret_is_refused_as_our_own_error(config: StorageConfig, prefix: str) -> None:
    store = S3ObjectStore(replace(config, secret_key="wrong"))
    with pytest.raises(StorageUnavailableError):
        store.put_bytes(prefix + "object", b"x", content_type=TYPE)
    with pytest.raises(StorageUnavailableError):
        store.stat(prefix + "object")


def test_the_secret_is_not_shown(config: StorageConfig) -> None:
    assert str(config.secret_key) not in repr(config)


@contextmanager
def answering(answers: dict[str, tuple[str, str]]) -> Iterator[str]:
    """Another's server: answers of a kind and a content by the path or the action that is asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            action = dict(parse_qsl(parts.query)).get("Action")
            kind, content = answers[action or parts.path]
            self.send_response(200)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(content.encode())

        do_POST = do_PUT = do_GET

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


LATER = "2099-01-01T00:00:00Z"
ROLE = '{"AccessKeyId": "%s", "SecretAccessKey": "%s", "Token": "t", "Expiration": "%s"}'
IDENTITY = (
    '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
    "<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>%s</AccessKeyId>"
    "<SecretAccessKey>%s</SecretAccessKey><SessionToken></SessionToken><Expiration>%s</Expiration></Credentials>"
    "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
)


@pytest.fixture
def keyless(config: StorageConfig, monkeypatch: pytest.MonkeyPatch) -> StorageConfig:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    return replace(config, access_key=None, secret_key=None)


def test_keys_may_come_from_the_environment(
    keyless: StorageConfig, config: StorageConfig, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(config.access_key))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(config.secret_key))
    stored = S3ObjectStore(keyless).put_bytes(f"{prefix}a", b"content", content_type=TYPE)
    assert stored == describe(b"content")


def test_keys_may_come_by_a_web_identity(
    keyless: StorageConfig, config: StorageConfig, tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("a.web.token")
    identity = IDENTITY % (config.access_key, config.secret_key, LATER)
    with answering({"AssumeRoleWithWebIdentity": ("text/xml", identity)}) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/espalier")
        stored = S3ObjectStore(keyless).put_bytes(f"{prefix}a", b"content", content_type=TYPE)
    assert stored == describe(b"content")


def test_keys_may_be_those_of_the_containers_role(
    keyless: StorageConfig, config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = ROLE % (config.access_key, config.secret_key, LATER)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")  # is asked for web identities only
    with answering({"/role": ("application/json", role)}) as url:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{url}/role")
        signed = S3ObjectStore(keyless).presign_put("tenants/a/b", expires=MINUTE)
    (credential,) = parse_qs(urlsplit(signed).query)["X-Amz-Credential"]
    assert credential.startswith(f"{config.access_key}/")


def test_keys_may_be_those_of_the_machines_role(
    keyless: StorageConfig, config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = "/latest/meta-data/iam/security-credentials/"
    answers = {
        "/latest/api/token": ("text/plain", "a-token"),
        roles: ("text/plain", "espalier"),
        f"{roles}espalier": ("application/json", ROLE % (config.access_key, config.secret_key, LATER)),
    }
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")  # is asked for web identities only
    with answering(answers) as url:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
        signed = S3ObjectStore(keyless).presign_put("tenants/a/b", expires=MINUTE)
    (credential,) = parse_qs(urlsplit(signed).query)["X-Amz-Credential"]
    assert credential.startswith(f"{config.access_key}/")


def test_where_nobody_has_keys_the_error_says_what_to_set(
    keyless: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:9/role")
    with pytest.raises(StorageUnavailableError, match="access key and secret key"):
        S3ObjectStore(keyless).ensure_bucket()
