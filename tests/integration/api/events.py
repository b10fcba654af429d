"""A client of the event stream: reads server-sent events from the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.waiting import PATIENCE_SECONDS


@dataclass(frozen=True)
class Received:
    id: int | None
    kind: str
    body: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.body["data"]["step"])


@contextmanager
def open_stream(
    api_url: str, api_key: str, job_id: str, *, after: int | None = None, timeout: float = PATIENCE_SECONDS
) -> Iterator[Iterator[Received]]:
    headers = {"authorization": f"Bearer {api_key}"} | ({} if after is None else {"last-event-id": str(after)})
    url = f"{api_url}/v1/fine_tuning/jobs/{job_id}/stream"
    with httpx.stream("GET", url, headers=headers, timeout=timeout, trust_env=False) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield _parse(response.iter_lines())


def _parse(lines: Iterator[str]) -> Iterator[Received]:
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            number = int(fields["id"]) if "id" in fields else None
            yield Received(number, fields.get("event", "message"), json.loads(fields["data"]))
            fields = {}
        else:
            fields = {}
