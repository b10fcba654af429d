"""Decodes the bytes of a line to JSON, in linear time. Raises nothing but RefusalError, whatever the bytes are."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NoReturn

from core.domain.datasets.refusals import refuse, show_value
from core.domain.datasets.values import DatasetLimits
from core.domain.json_faults import BOM as BOM_TEXT
from core.domain.json_faults import explain_json_error, is_cut

BOM = b"\xef\xbb\xbf"
# Python refuses to convert integers that are much longer, and no training row needs one.
_MAX_INTEGER_DIGITS = 400
# Possessive, and it also matches a string that never ends, so that it takes linear time on every line.
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")


def decode_line(line: bytes, limits: DatasetLimits, *, ends_file: bool) -> Any:
    """Return the JSON value on a line. `ends_file`: the file ends here without a line feed, and may be cut off."""
    if not line.strip():
        refuse("", "empty_line", "The line is empty.", "Remove it.")
    if _is_deeper(line, limits.max_depth):
        refuse("", "too_deep", "The JSON is nested too deeply.", f"Use at most {limits.max_depth} levels.")
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        _refuse_bytes(error, ends_file=ends_file)
    except json.JSONDecodeError as error:
        _refuse_json(error, ends_file=ends_file)


def _refuse_bytes(error: UnicodeDecodeError, *, ends_file: bool) -> NoReturn:
    if ends_file and error.reason == "unexpected end of data":
        _refuse_cut()
    refuse("", "not_utf8", f"Byte {error.start + 1} of the line is not UTF-8.", "Save the file as UTF-8.")


def _refuse_json(error: json.JSONDecodeError, *, ends_file: bool) -> NoReturn:
    if error.doc.startswith(BOM_TEXT, error.pos):
        _refuse_mark()
    if ends_file and is_cut(error):
        _refuse_cut()
    fault = explain_json_error(error)
    refuse(f"column {fault.column}", "not_json", f"This is not JSON: {fault.what}.", fault.hint)


def _refuse_mark() -> NoReturn:
    message = "A byte order mark (U+FEFF) stands inside the file, as where two files were joined."
    refuse("", "bom_inside", message, "Remove it, and let a new line begin there.")


def _refuse_cut() -> NoReturn:
    refuse("", "last_line_cut", "The file ends in the middle of a row.", "Upload the whole file.")


def _is_deeper(line: bytes, max_depth: int) -> bool:
    """Say whether brackets nest deeper than allowed, before a recursive parser reads them."""
    if line.count(b"[") + line.count(b"{") <= max_depth:
        return False
    depth = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub(b"", line)):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            return True
    return False


def _refuse_constant(constant: str) -> NoReturn:
    refuse("", "not_a_number", f"{constant} is not JSON.", "Use a number or null.")


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_INTEGER_DIGITS:
        refuse("", "huge_integer", f"An integer has {len(digits)} digits.", "Remove it.")
    return int(digits)


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        refuse("", "duplicate_field", f"An object has the field {show_value(twice)} twice.", "Keep one of them.")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_parse_int, object_pairs_hook=_unique_fields)
