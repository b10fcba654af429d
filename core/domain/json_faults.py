"""Explains errors in JSON in plain words. The json module's messages say what its parser expected, not what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from json import JSONDecodeError

BOM = "\ufeff"
_PYTHON_WORDS = {"None": "null", "True": "true", "False": "false"}
_WORD = re.compile(r"[A-Za-z_]\w*")
# Incomplete beginnings of a JSON value.
_CUT_VALUES = ("true", "false", "null", "-")
_CUT_ESCAPE = re.compile(r"u[0-9A-Fa-f]{0,4}")
_CUT_NUMBER = re.compile(r"\.|[eE][+-]?")
_SINGLE_QUOTES = ("single quotes stand where JSON has double quotes", "Write \"text\", not 'text'.")
_TRAILING_COMMA = ("a comma stands before a closing bracket", "Remove the comma.")
_AT_THE_END = ("the text ends where more should follow", "Close every string, list and object.")
_EXPECTED_NAME = "Expecting property name enclosed in double quotes"
_BY_MESSAGE = {
    "Unterminated string starting at": (
        "a string begins and never ends",
        'Close it with a double quote, and write a quote inside it as \\".',
    ),
    "Invalid \\escape": (
        "a backslash stands before a character that needs none",
        "Write a backslash as two: \\\\.",
    ),
    "Invalid \\uXXXX escape": (
        "\\u is not followed by four hexadecimal digits",
        "Write them, or write a backslash as two: \\\\.",
    ),
    "Expecting ':' delimiter": ("a colon is missing after a field's name", 'Write {"name": value}.'),
    "Expecting ',' delimiter": (
        "a comma is missing, or a closing bracket, or a quote inside a string stands bare",
        'Put a comma between two values; write a quote inside a string as \\".',
    ),
    # Python 3.13 and later
    "Illegal trailing comma before end of object": _TRAILING_COMMA,
    "Illegal trailing comma before end of array": _TRAILING_COMMA,
}


@dataclass(frozen=True)
class JsonFault:
    """`what` continues a sentence; `hint` says what to write. `line` and `column` count from 1."""

    line: int
    column: int
    what: str
    hint: str


def explain_json_error(error: JSONDecodeError) -> JsonFault:
    """Return what the text has at the place of the error, and what it should have."""
    what, hint = _explain(error.msg, error.doc, error.pos)
    return JsonFault(error.lineno, error.colno, what, hint)


def is_cut(error: JSONDecodeError) -> bool:
    """Say whether the parser stopped because the text ended, so that its rest may be missing."""
    rest = error.doc[error.pos :].strip()
    if error.msg.startswith("Unterminated string"):
        return True
    if error.msg.startswith("Invalid \\uXXXX"):
        return _CUT_ESCAPE.fullmatch(rest) is not None
    if error.msg == "Expecting value":
        return any(word.startswith(rest) for word in _CUT_VALUES)
    return not rest or (error.doc[error.pos - 1].isdigit() and _CUT_NUMBER.fullmatch(rest) is not None)


def _explain(message: str, text: str, position: int) -> tuple[str, str]:
    here = text[position : position + 1]
    if not text.strip():
        return "there is nothing", "Write a JSON object."
    if message == "Extra data":
        return _explain_extra(here)
    if message.startswith("Invalid control character"):
        return _explain_control(text, position)
    if not text[position:].strip():
        return _AT_THE_END
    if message in {"Expecting value", _EXPECTED_NAME}:
        return _explain_unexpected(message, text, position)
    return next(
        (words for start, words in _BY_MESSAGE.items() if message.startswith(start)),
        ("the text is not as JSON has it", "Write it with a JSON library."),
    )


def _explain_extra(here: str) -> tuple[str, str]:
    if here in {"{", "["}:
        return "a second value begins after the first", "Write every object on a line of its own."
    if here == ",":
        return "a comma stands after the object", "Remove it: nothing stands between lines."
    return "something stands after the object", "Remove it, or write it on a line of its own."


def _explain_control(text: str, position: int) -> tuple[str, str]:
    point = ord(text[position])
    written = {9: "\\t", 10: "\\n", 13: "\\r"}.get(point, f"\\u{point:04x}")
    return f"a string holds a bare control character (U+{point:04X})", f"Write it as {written}."


def _explain_unexpected(message: str, text: str, position: int) -> tuple[str, str]:
    """Explain a character that cannot begin a value or a field's name."""
    here, word = text[position], _WORD.match(text, position)
    if here == "'":
        return _SINGLE_QUOTES
    if here in "]}":
        return _TRAILING_COMMA if text[:position].rstrip().endswith(",") else ("a value is missing", "Write it.")
    if word and word[0] in _PYTHON_WORDS:
        return f"{word[0]} is Python's", f"Write {_PYTHON_WORDS[word[0]]}."
    kind = "field's name" if message == _EXPECTED_NAME else "value"
    if word:
        return f"a {kind} stands without quotes", "Write text in double quotes."
    return f"a {kind} is missing", "Write it."
