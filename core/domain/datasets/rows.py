"""The rules of one row: {"messages": [{"role", "content", "weight"?, "name"?}, ...]}, the same in API and trainer.

`content` is a string, or a list of {"type": "text", "text": ...} parts, which are joined without a separator. A field
with the value null counts as absent everywhere, because exports of tables give every row every column. Tool calls are
refused by name, because each chat template writes them in its own way. Whatever the bytes are, only ProblemError is
raised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from core.domain.datasets.decoding import BOM, decode_line
from core.domain.datasets.foreign import (
    FOREIGN_FORMAT,
    ForeignFormat,
    recognise_file,
    recognise_open_end,
    recognise_row,
)
from core.domain.datasets.refusals import RefusalError, refuse, show_value
from core.domain.datasets.values import (
    ChatExample,
    ChatMessage,
    DatasetLimits,
    ForeignFileError,
    Problem,
    ProblemError,
)

ROLES = ("system", "user", "assistant")
EXAMPLE_FIELDS = {"messages"}
MESSAGE_FIELDS = {"role", "content", "weight", "name"}
PART_FIELDS = {"type", "text"}
# Lists of OpenAI's format that are ignored when they are empty.
EMPTY_IS_ABSENT = {"tools", "functions", "tool_calls", "annotations"}
_NO_TOOLS = ("tool calls are not supported yet.", "Remove the field.")
# Fields of OpenAI's format that cannot be learnt, each with a message and a hint.
UNSUPPORTED_FIELDS = {
    "tools": _NO_TOOLS,
    "parallel_tool_calls": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "tool_calls": _NO_TOOLS,
    "tool_call_id": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "refusal": ("a refusal is learnt as text, not as a field.", "Move its words to `content`, or drop the row."),
    "audio": ("only text is learnt.", "Remove the field, and write what was said in `content`."),
    "annotations": ("the citations of an answer are not learnt.", "Remove the field."),
}
_DEFAULT_LIMITS = DatasetLimits()
_NOT_TEXT = re.compile("[\x00\ud800-\udfff]")


def iterate_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the number (1 is the first) and the bytes, without the line feed, of every line that belongs to the rows.

    Blank lines are held back until a row follows, because those at the end of a file are ignored. Only their number is
    kept.
    """
    num_blank = 0
    for number, line in enumerate(lines, start=1):
        if is_blank(line, line_number=number):
            num_blank += 1
            continue
        for blank in range(number - num_blank, number):
            yield blank, b""
        num_blank = 0
        yield number, line.removesuffix(b"\n")


def is_blank(line: bytes, *, line_number: int) -> bool:
    """Say whether a line is white space, except for the byte order mark that line 1 may have."""
    return not (line.removeprefix(BOM) if line_number == 1 else line).strip()


def parse_example(
    line: bytes, *, line_number: int, limits: DatasetLimits = _DEFAULT_LIMITS, ends_file: bool = False
) -> ChatExample:
    """Return the conversation on one line (without its line feed).

    A byte order mark is accepted on line 1. `ends_file` says that nothing follows, not even a line feed, so the row may
    be cut off. Raises ProblemError, and its subclass ForeignFileError if line 1 shows that the file has another format.
    """
    try:
        if line_number == 1:
            return _parse_first(line, limits, ends_file=ends_file)
        return _parse_row(decode_line(line, limits, ends_file=ends_file), limits)
    except RefusalError as refusal:
        raise _as_error(refusal, line_number) from None


def explain_first_line(line: bytes) -> ForeignFileError | None:
    """Return the error of a file whose first line, or the part of it that was read, shows another format."""
    found = recognise_file(line.removeprefix(BOM))
    return None if found is None else ForeignFileError(_as_problem(_foreign_file(found), 1))


def _parse_first(line: bytes, limits: DatasetLimits, *, ends_file: bool) -> ChatExample:
    """Parse line 1, which shows whether the file is JSON Lines at all."""
    line = line.removeprefix(BOM)
    if (found := recognise_file(line)) is not None:
        raise _foreign_file(found)
    if not ends_file and (found := recognise_open_end(line)) is not None:
        raise _foreign_file(found)
    return _parse_row(decode_line(line, limits, ends_file=ends_file), limits)


def _foreign_file(found: ForeignFormat) -> RefusalError:
    return RefusalError("", FOREIGN_FORMAT, found.message, found.command, ends_reading=True)


def _as_error(refusal: RefusalError, line_number: int) -> ProblemError:
    problem = _as_problem(refusal, line_number)
    return ForeignFileError(problem) if refusal.ends_reading else ProblemError(problem)


def _as_problem(refusal: RefusalError, line_number: int) -> Problem:
    return Problem(line_number, refusal.path, refusal.code, refusal.message, refusal.hint)


def _parse_row(row: Any, limits: DatasetLimits) -> ChatExample:
    if not isinstance(row, dict):
        refuse("", "not_an_object", "The line is not a JSON object.", 'Write {"messages": [...]}.')
    row = _drop_absent(row)
    if "messages" not in row and (found := recognise_row(row)) is not None:
        refuse("", FOREIGN_FORMAT, found.message, found.command)
    _check_fields(row, allowed=EXAMPLE_FIELDS)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        refuse("messages", "messages_missing", "`messages` is not a list with messages in it.", "Add the turns.")
    if len(messages) > limits.max_messages:
        hint = f"Split the conversation: at most {limits.max_messages} fit in a row."
        refuse("messages", "too_many_messages", f"There are {len(messages)} messages.", hint)
    turns: list[ChatMessage] = []
    for index, message in enumerate(messages):
        try:
            turns.append(_parse_message(message))
        except RefusalError as refusal:
            raise refusal.within(f"messages[{index}]") from None
    _check_learnable(turns)
    return ChatExample(messages=tuple(turns))


def _parse_message(message: Any) -> ChatMessage:
    if not isinstance(message, dict):
        refuse("", "not_an_object", "The message is not an object.", 'Write {"role": ..., "content": ...}.')
    message = _drop_absent(message)
    _check_fields(message, allowed=MESSAGE_FIELDS)
    role = message.get("role")
    if role not in ROLES:
        said = f"The role is {show_value(role)}." if "role" in message else "The message has no role."
        refuse("role", "unknown_role", said, f"Use one of {', '.join(ROLES)}.")
    if "content" not in message:
        hint = "Give a string, or a list of text parts; or drop the turn."
        refuse("content", "content_not_text", "The content is missing or null.", hint)
    content = _parse_content(message["content"])
    if role == "assistant" and not content.strip():
        refuse("content", "content_empty", "The assistant says nothing.", "Add text, or drop the turn.")
    return ChatMessage(role, content, _parse_weight(message) if "weight" in message else 1)


def _parse_content(content: Any) -> str:
    if isinstance(content, list) and content:
        content = "".join(_parse_part(part) for part in content)
    if not isinstance(content, str):
        refuse("content", "content_not_text", "The content is not text.", "Give a string, or a list of text parts.")
    if _NOT_TEXT.search(content):
        refuse("content", "not_text", "The content has a NUL or half a surrogate pair.", "Remove it.")
    return content


def _parse_part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        refuse("content", "content_not_text", "A part is not text.", 'Write {"type": "text", "text": ...}.')
    _check_fields(_drop_absent(part), allowed=PART_FIELDS)
    return str(part["text"])


def _parse_weight(message: dict[str, Any]) -> int:
    weight = message["weight"]
    if message["role"] != "assistant":
        refuse("weight", "bad_weight", "Only assistant messages have a weight.", "Remove it.")
    if isinstance(weight, bool) or weight not in (0, 1):  # True is an int in Python, but not a number here
        refuse("weight", "bad_weight", f"The weight is {show_value(weight)}.", "Use 0 or 1.")
    return int(weight)  # tables store whole numbers as 1.0


def _drop_absent(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are not null."""
    if None not in fields.values() and EMPTY_IS_ABSENT.isdisjoint(fields):  # most rows: do not copy them
        return fields
    return {
        name: value
        for name, value in fields.items()
        if value is not None and not (value == [] and name in EMPTY_IS_ABSENT)
    }


def _check_fields(fields: dict[str, Any], *, allowed: set[str]) -> None:
    if fields.keys() <= allowed:
        return
    name = next(name for name in fields if name not in allowed)
    if name in UNSUPPORTED_FIELDS:
        reason, hint = UNSUPPORTED_FIELDS[name]
        refuse(name, "not_supported", f"`{name}`: {reason}", hint)
    expected = ", ".join(sorted(allowed))
    refuse("", "unknown_field", f"The field {show_value(name)} is unknown.", f"Remove it; there are {expected}.")


def _check_learnable(turns: list[ChatMessage]) -> None:
    weights = [turn.weight for turn in turns if turn.role == "assistant"]
    if not weights:
        refuse("messages", "no_assistant", "There is no assistant message.", "Add the answer to learn.")
    if not any(weights):
        refuse("messages", "nothing_to_learn", "Every assistant weight is 0.", "Give one message weight 1.")
