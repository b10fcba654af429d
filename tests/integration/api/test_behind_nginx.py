"""The API behind nginx as in docs/install-one-host.md, at the root of a site and below a path."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from local.ports import free_ports
from local.processes import ChildProcess, ProcessSpec
from local.servers import ServerAddresses
from tests.databases import Database
from tests.deploy.packages import NotInstalledError, ensure_programs
from tests.factories.bases import BASE_MODEL
from tests.factories.tenants import Tenant
from tests.managed import HOST, Authority
from tests.processes import running_api
from tests.waiting import PATIENCE_SECONDS, wait_until

PAGE = Path(__file__).resolve().parents[3] / "docs" / "install-one-host.md"
ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(scope="module", params=["", "/espalier"])
def site(
    request: pytest.FixtureRequest,
    database: Database,
    servers: ServerAddresses,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[httpx.Client]:
    """A client of the site, by https, below the path at which the API is."""
    try:
        ensure_programs(("nginx",), packages=("nginx-light",))
    except NotInstalledError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("nginx")
    authority, (api_port, port) = Authority(directory), free_ports(2)
    config = write_config(directory, authority, port=port, api_port=api_port, path=request.param)
    subprocess.run(["nginx", "-t", "-c", str(config), "-p", str(directory)], check=True, capture_output=True)
    argv = ["nginx", "-c", str(config), "-p", str(directory), "-g", "daemon off;"]
    env = {"ESPALIER_ROOT_PATH": request.param}
    child = ChildProcess(ProcessSpec("nginx", argv), directory / "logs")
    trusted = ssl.create_default_context(cafile=authority.ca_file)
    try:
        with (
            running_api(database.api_url, servers.storage, port=api_port, env=env),
            httpx.Client(
                base_url=f"https://{HOST}:{port}{request.param}",
                verify=trusted,
                trust_env=False,
                timeout=PATIENCE_SECONDS,
            ) as client,
        ):
            wait_until(lambda: client.get("/livez").is_success, what="nginx")
            yield client
    finally:
        child.stop()


def write_config(directory: Path, authority: Authority, *, port: int, api_port: int, path: str) -> Path:
    """Write what the page says, with ports and certificates that are to be had here."""
    server, location = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    if path:
        server = re.sub(r"    location / \{.*?\n    \}\n", lambda _: location, server, flags=re.DOTALL)
    certificate, key = authority.issue(HOST)
    for said, meant in {
        "listen 443": f"listen 127.0.0.1:{port}",
        "espalier.example.com": HOST,
        "/etc/ssl/espalier.pem": str(certificate),
        "/etc/ssl/espalier.key": str(key),
        "127.0.0.1:8000": f"127.0.0.1:{api_port}",
    }.items():
        assert said in server
        server = server.replace(said, meant)
    temporary = "".join(
        f"{name}_temp_path {directory};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    config = directory / "nginx.conf"
    config.write_text(
        f"{user} pid {directory}/pid; error_log stderr; events {{}}\nhttp {{ access_log off; {temporary}\n{server} }}\n"
    )
    return config


def test_a_file_larger_than_a_proxy_buffers_passes_and_a_job_is_followed(site: httpx.Client, tenant: Tenant) -> None:
    # Not closed: it would close the site's client with it.
    client = OpenAI(
        base_url=str(site.base_url).rstrip("/") + "/v1",
        api_key=tenant.api_key,
        max_retries=0,
        http_client=site,  # type: ignore[arg-type]  # openai also takes a client of httpx
    )
    file = client.files.create(file=("rows.jsonl", ROW * 60_000), purpose="fine-tune")  # 5 MB
    job = client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file.id)
    url = f"v1/fine_tuning/jobs/{job.id}/stream"
    with site.stream("GET", url, headers={"authorization": f"Bearer {tenant.api_key}"}) as answer:
        assert any(line.startswith("id:") for line in answer.iter_lines())  # while the stream is open


def test_the_documentation_finds_its_document(site: httpx.Client) -> None:
    page = site.get("/docs")
    links = re.findall(r'(?:data-url|src|href)="([^"]+)"', page.text)
    found = {link: site.get(page.url.join(link)) for link in links if not link.startswith("data:")}
    assert {link: answer.status_code for link, answer in found.items()} == dict.fromkeys(found, 200)
    document = found["openapi.json"].json()
    assert "/v1/files" in document["paths"]
    below = site.base_url.path.rstrip("/")
    assert document.get("servers") == ([{"url": below}] if below else None)
