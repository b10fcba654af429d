"""Log lines of a request and its answer have the same id, and each answer is counted by its route."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import structlog
from prometheus_client import REGISTRY
from starlette.types import Message, Receive, Scope, Send

from api.middleware import RequestIdMiddleware


def answer(scope: Scope, *, status: int = 200) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the variables that are bound while the application works, and the headers of its answer."""
    bound: dict[str, Any] = {}
    sent: list[Message] = []

    async def app(inner: Scope, _receive: Receive, send: Send) -> None:
        inner["route"] = SimpleNamespace(path_format="/v1/things/{thing_id}")
        bound.update(structlog.contextvars.get_contextvars())
        await send({"type": "http.response.start", "status": status, "headers": []})

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(RequestIdMiddleware(app)(scope, receive, send))
    return bound, {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def counted(**labels: str) -> float:
    return REGISTRY.get_sample_value("espalier_http_requests_total", labels) or 0.0


def test_a_line_and_the_answer_name_the_request_alike() -> None:
    bound, headers = answer({"type": "http", "method": "GET"})
    assert bound["request_id"] == headers["x-request-id"]
    assert answer({"type": "http", "method": "GET"})[0]["request_id"] != bound["request_id"]
    assert "request_id" not in structlog.contextvars.get_contextvars()


def test_an_answer_is_counted_by_its_template_and_a_method_that_nobody_knows_is_other() -> None:
    labels = {"route": "/v1/things/{thing_id}", "status": "4xx"}
    before = counted(method="other", **labels)
    answer({"type": "http", "method": "BREW"}, status=418)
    answer({"type": "http", "method": "SIP"}, status=404)
    assert counted(method="other", **labels) == before + 2
