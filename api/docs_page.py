"""The page at /docs: Swagger UI over the OpenAPI document. We serve its files, so it needs no other host.

Every link of the page is relative, so the page works below any prefix. The files are read once, when the application is
made, so a request for the page takes no thread.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response

_STATIC = Path(__file__).parent / "static"
# Scripts, styles and requests of the same origin only. Swagger UI's style sheet holds its icons as data.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class _StaticFile:
    path: str
    source: str
    media_type: str


_FILES = (
    _StaticFile("/docs", "docs.html", "text/html"),
    _StaticFile("/docs/docs.js", "docs.js", "text/javascript"),
    _StaticFile("/docs/swagger-ui-bundle.js", "swagger_ui/swagger-ui-bundle.js", "text/javascript"),
    _StaticFile("/docs/swagger-ui.css", "swagger_ui/swagger-ui.css", "text/css"),
)


def add_docs_page(app: FastAPI) -> None:
    for file in _FILES:
        app.add_route(file.path, _serve(file), include_in_schema=False)


def _serve(file: _StaticFile) -> Callable[[Request], Awaitable[Response]]:
    content = (_STATIC / file.source).read_bytes()

    async def answer(_request: Request) -> Response:
        return Response(content, media_type=file.media_type, headers={"content-security-policy": POLICY})

    return answer
