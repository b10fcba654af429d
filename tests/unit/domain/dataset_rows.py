"""Rows of datasets: bad ones, each with its problem, and good ones."""

from __future__ import annotations

import json

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
GOOD_ROW = {"messages": [USER, ANSWER]}
GOOD = json.dumps(GOOD_ROW).encode()


def row(*messages: object, **fields: object) -> bytes:
    return json.dumps({"messages": list(messages), **fields}).encode()


def assistant(**fields: object) -> dict[str, object]:
    return {**ANSWER, **fields}


BAD_ROWS = {
    # what is wrong: (the line, the code, the path)
    "not JSON": (b"hello", "not_json", "column 1"),
    "two values": (GOOD + GOOD, "not_json", f"column {len(GOOD) + 1}"),
    "a raw control character": (b'{"messages": "\x01"}', "not_json", "column 15"),
    "not UTF-8": (GOOD.replace(b"Why", b"\xff\xfe"), "not_utf8", ""),
    "a surrogate in UTF-8": (GOOD.replace(b"Why", b"\xed\xa0\x80"), "not_utf8", ""),
    "UTF-16": (GOOD.decode().encode("utf-16-le"), "not_json", "column 2"),
    "empty": (b"", "empty_line", ""),
    "white space": (b" \t\r", "empty_line", ""),
    "a list": (b"[]", "not_an_object", ""),
    "null": (b"null", "not_an_object", ""),
    "no messages": (b"{}", "messages_missing", "messages"),
    "messages null": (b'{"messages": null}', "messages_missing", "messages"),
    "messages an object": (b'{"messages": {}}', "messages_missing", "messages"),
    "messages empty": (row(), "messages_missing", "messages"),
    "too many messages": (row(*[ANSWER] * 1001), "too_many_messages", "messages"),
    "a prompt and a completion": (b'{"prompt": "a", "completion": "b"}', "foreign_format", ""),
    "an unknown field": (row(USER, ANSWER, extra=1), "unknown_field", ""),
    "tools": (row(USER, ANSWER, tools=[{}]), "not_supported", "tools"),
    "parallel tool calls": (row(USER, ANSWER, parallel_tool_calls=True), "not_supported", "parallel_tool_calls"),
    "tool calls": (
        row(USER, {"role": "assistant", "tool_calls": [{}]}),
        "not_supported",
        "messages[1].tool_calls",
    ),
    "a tool's answer": (
        row(USER, {"role": "tool", "tool_call_id": "1", "content": "x"}),
        "not_supported",
        "messages[1].tool_call_id",
    ),
    "a message that is text": (row("hello"), "not_an_object", "messages[0]"),
    "an unknown field of a message": (row(USER, assistant(mood="good")), "unknown_field", "messages[1]"),
    "an unknown role": (row(USER, {"role": "robot", "content": "x"}), "unknown_role", "messages[1].role"),
    "a role that is a list": (row({"role": [], "content": "x"}), "unknown_role", "messages[0].role"),
    "no role": (row({"content": "x"}), "unknown_role", "messages[0].role"),
    "no content": (row({"role": "user"}), "content_not_text", "messages[0].content"),
    "content a number": (row({"role": "user", "content": 3}), "content_not_text", "messages[0].content"),
    "content an empty list": (row({"role": "user", "content": []}), "content_not_text", "messages[0].content"),
    "an image": (
        row({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        "content_not_text",
        "messages[0].content",
    ),
    "a part without text": (
        row({"role": "user", "content": [{"type": "text"}]}),
        "content_not_text",
        "messages[0].content",
    ),
    "a part that says more": (
        row({"role": "user", "content": [{"type": "text", "text": "x", "cache": True}]}),
        "unknown_field",
        "messages[0]",
    ),
    "NUL": (row({"role": "user", "content": "a\0b"}), "not_text", "messages[0].content"),
    "half a surrogate pair": (GOOD.replace(b"Why", rb"\ud83d"), "not_text", "messages[0].content"),
    "half a pair in a part": (
        row({"role": "user", "content": [{"type": "text", "text": "\udc00"}]}),
        "not_text",
        "messages[0].content",
    ),
    "an assistant who says nothing": (row(USER, assistant(content=" \n")), "content_empty", "messages[1].content"),
    "no assistant": (row(USER), "no_assistant", "messages"),
    "nothing to learn": (row(USER, assistant(weight=0)), "nothing_to_learn", "messages"),
    "a weight of 2": (row(USER, assistant(weight=2)), "bad_weight", "messages[1].weight"),
    "a weight of 0.5": (row(USER, assistant(weight=0.5)), "bad_weight", "messages[1].weight"),
    "a weight that is a list": (row(USER, assistant(weight=[1])), "bad_weight", "messages[1].weight"),
    "a weight that is text": (row(USER, assistant(weight="1")), "bad_weight", "messages[1].weight"),
    "a weight of true": (row(USER, assistant(weight=True)), "bad_weight", "messages[1].weight"),
    "a refusal": (row(USER, assistant(refusal="No.")), "not_supported", "messages[1].refusal"),
    "audio": (row(USER, assistant(audio={"id": "x"})), "not_supported", "messages[1].audio"),
    "annotations": (row(USER, assistant(annotations=[{}])), "not_supported", "messages[1].annotations"),
    "a function call": (row(USER, assistant(function_call={})), "not_supported", "messages[1].function_call"),
    "no content but null": (row(USER, assistant(content=None)), "content_not_text", "messages[1].content"),
    "a byte order mark": (b"\xef\xbb\xbf" + GOOD, "bom_inside", ""),
    "a byte order mark alone": (b"\xef\xbb\xbf", "bom_inside", ""),
    "two files joined": (GOOD + b"\xef\xbb\xbf" + GOOD, "bom_inside", ""),
    "a user's weight": (row({**USER, "weight": 1}, ANSWER), "bad_weight", "messages[0].weight"),
    "NaN": (row(USER, assistant(weight=float("nan"))), "not_a_number", ""),
    "Infinity": (row(USER, assistant(weight=float("-inf"))), "not_a_number", ""),
    "a huge integer": (b'{"messages": ' + b"9" * 100_000 + b"}", "huge_integer", ""),
    "a field twice": (b'{"messages": [], ' + GOOD[1:], "duplicate_field", ""),
    "a message's field twice": (GOOD.replace(b'"role"', b'"content": "", "role"', 1), "duplicate_field", ""),
    "deep lists": (b"[" * 100_000, "too_deep", ""),
    "deep lists that end": (b"[" * 100_000 + b"]" * 100_000, "too_deep", ""),
    "deep objects": (b'{"a":' * 100_000, "too_deep", ""),
    "deep inside a row": (b'{"messages": ' + b"[" * 16 + b"]" * 16 + b"}", "too_deep", ""),
}
GOOD_ROWS = {
    "a plain row": GOOD,
    "a carriage return at the end": GOOD + b"\r",
    "white space around": b"  " + GOOD + b"\t",
    "a line separator in text": GOOD.replace(b"Why", "a\u2028b".encode()),
    "a system message": row({"role": "system", "content": ""}, USER, ANSWER),
    "several turns": row(USER, assistant(weight=0), USER, assistant(weight=1)),
    "names": row({**USER, "name": "ann"}, ANSWER),
    "only an assistant": row(ANSWER),
    "ends with a user": row(USER, ANSWER, USER),
    "a whole surrogate pair": GOOD.replace(b"Why", rb"\ud83d\ude00"),
    "brackets in text": row(USER, assistant(content="[{" * 5000)),
    "an escaped quote before brackets": row(USER, assistant(content='\\" [[[[[[[[[[[[[[[[[[[[[[')),
    "as many messages as may be": row(*[ANSWER] * 1000),
}
