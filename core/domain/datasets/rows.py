"""The rules of one row: {"messages": [{"role", "content", "weight"?, "name"?}, ...]}, the same in API and trainer.

`content` is a string, or a list of {"type": "text", "text": ...} parts, which are joined as they stand. Tool calls are
refused by name, since chat templates write them in ways of their own. Whatever the bytes are, nothing but ProblemError
is raised.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NoReturn

from core.domain.datasets.values import ChatExample, ChatMessage, DatasetLimits, Problem, ProblemError

ROLES = ("system", "user", "assistant")
EXAMPLE_FIELDS = {"messages"}
MESSAGE_FIELDS = {"role", "content", "weight", "name"}
PART_FIELDS = {"type", "text"}
UNSUPPORTED_FIELDS = {"tools", "parallel_tool_calls", "functions", "tool_calls", "tool_call_id", "function_call"}
BOM = b"\xef\xbb\xbf"
_DEFAULT_LIMITS = DatasetLimits()
# Python refuses to convert much longer integers, and no training row needs one.
_MAX_INTEGER_DIGITS = 400
# Possessive, and a string that never ends matches too: linear in time whatever the line is.
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")
_NOT_TEXT = re.compile("[\x00\ud800-\udfff]")
_MAX_SHOWN_CHARACTERS = 60


class _RefusalError(Exception):
    """What is wrong with a row, before its line number is known."""

    def __init__(self, path: str, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.path, self.code, self.message, self.hint = path, code, message, hint

    def within(self, parent: str) -> _RefusalError:
        """Return the same seen from the parent: paths are built only when something is wrong."""
        path = f"{parent}.{self.path}" if self.path else parent
        return _RefusalError(path, self.code, self.message, self.hint)


def parse_example(line: bytes, *, line_number: int, limits: DatasetLimits = _DEFAULT_LIMITS) -> ChatExample:
    """Return the conversation on one line (without its line feed). Raises ProblemError.

    A byte order mark is accepted on line 1.
    """
    try:
        return _parse_row(_decode(line.removeprefix(BOM) if line_number == 1 else line, limits), limits)
    except _RefusalError as refusal:
        problem = Problem(line_number, refusal.path, refusal.code, refusal.message, refusal.hint)
        raise ProblemError(problem) from None


def _decode(line: bytes, limits: DatasetLimits) -> Any:
    if not line.strip():
        _refuse("", "empty_line", "The line is empty.", "Remove it.")
    if _is_deeper(line, limits.max_depth):
        _refuse("", "too_deep", "The JSON is nested too deeply.", f"Use at most {limits.max_depth} levels.")
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        _refuse("", "not_utf8", f"Byte {error.start + 1} of the line is not UTF-8.", "Save the file as UTF-8.")
    except json.JSONDecodeError as error:
        _refuse("", "not_json", f"The line is not JSON: {error.msg} at column {error.colno}.", "Mend the JSON.")


def _is_deeper(line: bytes, max_depth: int) -> bool:
    """Say whether brackets nest deeper than allowed, before a recursive parser sees them."""
    if line.count(b"[") + line.count(b"{") <= max_depth:
        return False
    depth = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub(b"", line)):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            return True
    return False


def _parse_row(row: Any, limits: DatasetLimits) -> ChatExample:
    if not isinstance(row, dict):
        _refuse("", "not_an_object", "The line is not a JSON object.", 'Write {"messages": [...]}.')
    _check_fields(row, allowed=EXAMPLE_FIELDS)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "messages_missing", "`messages` is not a list with messages in it.", "Add the turns.")
    if len(messages) > limits.max_messages:
        hint = f"Split the conversation: at most {limits.max_messages} fit in a row."
        _refuse("messages", "too_many_messages", f"There are {len(messages)} messages.", hint)
    turns: list[ChatMessage] = []
    for index, message in enumerate(messages):
        try:
            turns.append(_parse_message(message))
        except _RefusalError as refusal:
            raise refusal.within(f"messages[{index}]") from None
    _check_learnable(turns)
    return ChatExample(messages=tuple(turns))


def _parse_message(message: Any) -> ChatMessage:
    if not isinstance(message, dict):
        _refuse("", "not_an_object", "The message is not an object.", 'Write {"role": ..., "content": ...}.')
    _check_fields(message, allowed=MESSAGE_FIELDS)
    role = message.get("role")
    if role not in ROLES:
        said = f"The role is {_show(role)}." if "role" in message else "The message has no role."
        _refuse("role", "unknown_role", said, f"Use one of {', '.join(ROLES)}.")
    content = _parse_content(message.get("content"))
    if role == "assistant" and not content.strip():
        _refuse("content", "content_empty", "The assistant says nothing.", "Add text, or drop the turn.")
    return ChatMessage(role, content, _parse_weight(message) if "weight" in message else 1)


def _parse_content(content: Any) -> str:
    if isinstance(content, list) and content:
        content = "".join(_parse_part(part) for part in content)
    if not isinstance(content, str):
        _refuse("content", "content_not_text", "The content is not text.", "Give a string, or a list of text parts.")
    if _NOT_TEXT.search(content):
        _refuse("content", "not_text", "The content has a NUL or half a surrogate pair.", "Remove it.")
    return content


def _parse_part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        _refuse("content", "content_not_text", "A part is not text.", 'Write {"type": "text", "text": ...}.')
    _check_fields(part, allowed=PART_FIELDS)
    return str(part["text"])


def _parse_weight(message: dict[str, Any]) -> int:
    weight = message["weight"]
    if message["role"] != "assistant":
        _refuse("weight", "bad_weight", "Only assistant messages have a weight.", "Remove it.")
    if type(weight) is not int or weight not in (0, 1):  # True is an int too, and is not meant
        _refuse("weight", "bad_weight", f"The weight is {_show(weight)}.", "Use 0 or 1.")
    return weight


def _check_fields(fields: dict[str, Any], *, allowed: set[str]) -> None:
    if fields.keys() <= allowed:
        return
    name = next(name for name in fields if name not in allowed)
    if name in UNSUPPORTED_FIELDS:
        _refuse(name, "not_supported", f"`{name}`: tool calls are not supported yet.", "Remove the field.")
    expected = ", ".join(sorted(allowed))
    _refuse("", "unknown_field", f"The field {_show(name)} is unknown.", f"Remove it; there are {expected}.")


def _check_learnable(turns: list[ChatMessage]) -> None:
    weights = [turn.weight for turn in turns if turn.role == "assistant"]
    if not weights:
        _refuse("messages", "no_assistant", "There is no assistant message.", "Add the answer to learn.")
    if not any(weights):
        _refuse("messages", "nothing_to_learn", "Every assistant weight is 0.", "Give one message weight 1.")


def _refuse(path: str, code: str, message: str, hint: str) -> NoReturn:
    raise _RefusalError(path, code, message, hint)


def _show(value: object) -> str:
    """Show a tenant's value shortly, safe to store as text."""
    return ascii(value)[:_MAX_SHOWN_CHARACTERS]


def _refuse_constant(constant: str) -> NoReturn:
    _refuse("", "not_a_number", f"{constant} is not JSON.", "Use a number or null.")


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_INTEGER_DIGITS:
        _refuse("", "huge_integer", f"An integer has {len(digits)} digits.", "Remove it.")
    return int(digits)


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    _refuse("", "duplicate_field", f"An object has the field {_show(twice)} twice.", "Keep one of them.")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_parse_int, object_pairs_hook=_unique_fields)
