"""Datasets: rows that can be trained on, uploaded as a client does it."""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI

GOOD_ROW = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}
GOOD = json.dumps(GOOD_ROW).encode()


def upload(client: OpenAI, content: bytes, name: str = "rows.jsonl") -> Any:
    return client.files.create(file=(name, content), purpose="fine-tune")


def upload_rows(client: OpenAI, rows: list[str]) -> Any:
    return upload(client, "\n".join(rows).encode())
