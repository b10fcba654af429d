"""Valid files as public tools write them: name -> bytes. Every reader of rows must accept them all."""

from __future__ import annotations

import json
from typing import Any

USER = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris."}
# What ChatCompletionMessage.model_dump() of OpenAI's client gives, 1.x to 3.x.
DUMPED: dict[str, Any] = {
    "content": "Paris.",
    "refusal": None,
    "role": "assistant",
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": None,
}
# The columns of a table hold every field that any of its rows has.
TABLE_COLUMNS = {"name": None, "weight": None, "tool_calls": None, "tool_call_id": None, "refusal": None}
_ABSENT = {"tools": None, "parallel_tool_calls": None, "functions": None, "source": None}


def _lines(*rows: dict[str, Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def _row(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), **fields}


_PLAIN = _lines(_row(USER, ANSWER), _row({"role": "system", "content": "Be brief."}, USER, ANSWER))

PUBLIC_FILES = {
    "plain": _PLAIN,
    "Arrow with null columns": _lines(
        _row(USER | TABLE_COLUMNS, ANSWER | TABLE_COLUMNS | {"weight": 1}, **_ABSENT), _row(USER, ANSWER, tools=[])
    ),
    "pandas with numbers as floats": _lines(
        _row(USER | {"weight": None}, ANSWER | {"weight": 0.0}, USER | {"weight": None}, ANSWER | {"weight": 1.0})
    ),
    "parts with null columns": _lines(
        _row(USER | {"content": [{"type": "text", "text": "Which?", "image_url": None, "refusal": None}]}, ANSWER)
    ),
    "the client's model_dump()": _lines(_row(USER, DUMPED), _row(USER, DUMPED, parallel_tool_calls=None)),
    "blank lines at the end": _PLAIN + b"\n \n\r\n",
    "a byte order mark at the start": b"\xef\xbb\xbf" + _PLAIN,
    "CRLF": _lines(_row(USER, ANSWER), _row(USER, ANSWER), end="\r\n") + b"\r\n",
    "no line feed at the end": _PLAIN.rstrip(b"\n"),
    "escaped beyond ASCII": json.dumps(_row(USER, {"role": "assistant", "content": "Été \U0001f600"})).encode() + b"\n",
}
