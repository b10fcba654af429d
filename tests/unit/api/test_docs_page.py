"""The page at /docs loads all files from the API itself, below any prefix, and under a strict policy."""

from __future__ import annotations

import hashlib
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import pytest
from fastapi.testclient import TestClient

from tests.routes import make_app

ROOT = Path(__file__).resolve().parents[3]
VENDORED = ROOT / "api/static/swagger_ui"
CLIENT = TestClient(make_app())


class Links(HTMLParser):
    """What a page loads."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in {"src", "href", "data-url"} and value]


def links_of(page: str) -> list[str]:
    return [link for link in Links(page).found if link != "data:,"]


def test_the_page_and_every_file_that_it_names_come_from_the_api() -> None:
    page = CLIENT.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    answers = {link: CLIENT.get(urljoin("/docs", link)) for link in links_of(page.text)}
    kinds = {link: answer.headers["content-type"].partition(";")[0] for link, answer in answers.items()}
    assert {answer.status_code for answer in answers.values()} == {200}
    assert kinds == {
        "docs/swagger-ui.css": "text/css",
        "docs/swagger-ui-bundle.js": "text/javascript",
        "docs/docs.js": "text/javascript",
        "openapi.json": "application/json",
    }
    assert "/v1/files" in answers["openapi.json"].json()["paths"]


def test_the_page_and_its_script_name_no_other_host() -> None:
    for path in ("/docs", "/docs/docs.js"):
        assert "//" not in re.sub(r"^//.*$", "", CLIENT.get(path).text, flags=re.MULTILINE)
    assert "url(http" not in (VENDORED / "swagger-ui.css").read_text()
    assert CLIENT.get("/redoc").status_code == 404, "FastAPI's own page, which asks another host"


@pytest.mark.parametrize("prefix", ["", "/espalier", "/a/b"])
def test_every_link_stays_below_the_prefix(prefix: str) -> None:
    links = links_of(CLIENT.get("/docs").text)
    assert all(
        urljoin(f"https://example.com{prefix}/docs", link).startswith(f"https://example.com{prefix}/") for link in links
    )


@pytest.mark.parametrize("path", ["/docs", "/docs/docs.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"])
def test_the_policy_lets_nothing_of_other_hosts_and_nothing_inline_run(path: str) -> None:
    policy = dict(rule.split(" ", 1) for rule in CLIENT.get(path).headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("img-src") == "'self' data:"
    assert set(policy.values()) == {"'self'", "'none'"}


def test_the_page_has_no_script_or_style_of_its_own() -> None:
    page = CLIENT.get("/docs").text
    assert re.findall(r"<script(?![^>]* src=)|<style| style=| on\w+=", page) == []


def test_the_vendored_files_are_those_whose_checksums_are_written_down() -> None:
    lines = (VENDORED / "SHA256SUMS").read_text().splitlines()
    written = {name: digest for digest, name in (line.split() for line in lines)}
    there = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDORED.iterdir()}
    assert {name: there[name] for name in there if name not in {"SHA256SUMS", "README.md"}} == written


def test_the_package_holds_every_static_file() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["api"]
    packed = {path for pattern in patterns for path in (ROOT / "api").glob(pattern) if path.is_file()}
    assert packed == {path for path in (ROOT / "api/static").rglob("*") if path.is_file()}
