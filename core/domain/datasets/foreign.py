"""Recognises other formats by name, and gives for each the one command that converts it to our rows.

The commands read `old.*` and write `new.jsonl`. From a tenant's file they contain only names of columns that are in the
lists below. So it is safe to paste a command into a shell: it runs only what is written here.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from typing import Any

FOREIGN_FORMAT = "foreign_format"  # the code of such a problem, whose hint is the command
HEAD_BYTES = 4096  # bytes of a file are enough to recognise it
# The names of a question and of its answer in public data sets. The first pair that is there counts.
_QUESTIONS = ("prompt", "instruction", "question", "query", "input", "user")
_ANSWERS = ("completion", "response", "output", "answer", "assistant")
_COLUMNS = {*_QUESTIONS, *_ANSWERS, "messages", "text", "chosen", "rejected", "system", "role", "content"}
_COLUMN = re.compile(r"[\w .-]{1,60}")
_ARRAY = re.compile(rb"\s*\[\s*(?:\{|$)")
# A row does not end in one of these.
_OPEN_ENDS = {b"{", b"[", b":", b","}
_TURNS = 'def turns(role): if type == "array" then . else [{role: role, content: .}] end; '


@dataclass(frozen=True)
class ForeignFormat:
    """`message` names the format, `command` converts it."""

    message: str
    command: str


def recognise_row(row: dict[str, Any]) -> ForeignFormat | None:
    """Return the format of a row without `messages`, or None for an unknown one."""
    for fields, found in _ROWS:
        if fields <= row.keys():
            return found
    if (pair := _find_pair(list(row))) is not None:
        question, answer = pair
        message = f"The row is a pair of `{question}` and `{answer}`, not a list of messages."
        return _rewritten(message, _pair_program(question, answer))
    return _PLAIN_TEXT if "text" in row else None


def recognise_file(first_line: bytes) -> ForeignFormat | None:
    """Return the format of a file that is not JSON Lines, from its first line, or from the part of it that was read."""
    for signature, message, command in _SIGNATURES:
        if first_line.startswith(signature):
            return ForeignFormat(message, command)
    if _ARRAY.match(first_line):
        message = "The file is one JSON array, not one object a line."
        return ForeignFormat(message, _jq(".[]", source="old.json"))
    return _recognise_csv(first_line)


def recognise_open_end(first_line: bytes) -> ForeignFormat | None:
    """Return what to do about a first line that ends inside an object, as in pretty-printed JSON."""
    text = first_line.strip()
    is_joined = text.endswith(b",") and text[:-1].rstrip().endswith(b"}")  # a row with a comma after it
    if not text.startswith(b"{") or text[-1:] not in _OPEN_ENDS or is_joined:
        return None
    message = "The JSON is pretty-printed: an object is spread over several lines."
    return ForeignFormat(message, _jq(".", source="old.json"))


def _recognise_csv(first_line: bytes) -> ForeignFormat | None:
    """Recognise a header by its names: all are short, and at least one is common in data sets."""
    header = first_line[:HEAD_BYTES].decode("utf-8", "replace").strip()
    separator = max(",;\t", key=header.count)
    if header[:1] in {"{", "["} or separator not in header:
        return None
    try:
        columns = next(csv.reader([header], delimiter=separator), [])
    except csv.Error:
        return None
    is_header = all(_COLUMN.fullmatch(column) for column in columns)
    if not is_header or not _COLUMNS & {column.strip().lower() for column in columns}:
        return None
    return _convert_csv(columns, separator)


def _convert_csv(columns: list[str], separator: str) -> ForeignFormat:
    message = "The file is CSV with a header, not JSON Lines."
    if "messages" in columns:
        return ForeignFormat(message, _csv_command('json.loads(row["messages"])', separator))
    pair = _find_pair(columns)
    if pair is None:
        message += " Name the columns of the question and of the answer `prompt` and `completion`."
    question, answer = pair or ("prompt", "completion")
    context = ' + "\\n\\n" * bool(row["input"]) + row["input"]' if {"instruction", "input"} <= set(columns) else ""
    turns = (
        f'[{{"role": "user", "content": row["{question}"]{context}}}, '
        f'{{"role": "assistant", "content": row["{answer}"]}}]'
    )
    return ForeignFormat(message, _csv_command(turns, separator))


def _csv_command(turns: str, separator: str) -> str:
    delimiter = "\\t" if separator == "\t" else separator
    reader = f'csv.DictReader(open("old.csv", encoding="utf-8-sig", newline=""), delimiter="{delimiter}")'
    row = f'json.dumps({{"messages": {turns}}})'
    return f"python3 -c 'import csv, json; [print({row}) for row in {reader}]' > new.jsonl"


def _find_pair(names: list[str]) -> tuple[str, str] | None:
    """Return the names of a question and its answer among these."""
    question = next((name for name in _QUESTIONS if name in names), None)
    answer = next((name for name in _ANSWERS if name in names), None)
    return (question, answer) if question and answer else None


def _pair_program(question: str, answer: str) -> str:
    return f'{_TURNS}{{messages: ((.{question} | turns("user")) + (.{answer} | turns("assistant")))}}'


def _rewritten(message: str, program: str) -> ForeignFormat:
    return ForeignFormat(message, _jq(program))


def _preferred(program: str) -> ForeignFormat:
    return _rewritten(
        "The row is preference data (DPO), which is not supported yet. Its preferred answers can be learnt alone.",
        program,
    )


def _jq(program: str, *, source: str = "old.jsonl") -> str:
    return f"jq -c '{program}' {source} > new.jsonl"


_SHAREGPT = (
    '{messages: [(.system // empty | {role: "system", content: .}), (.conversations[] | (.from // .role) as $from | '
    '{role: ({human: "user", gpt: "assistant"}[$from] // $from), content: (.value // .content)})]}'
)
_ALPACA = (
    '{messages: [{role: "user", content: ([.instruction, .input // ""] | map(select(. != "")) | join("\\n\\n"))}, '
    '{role: "assistant", content: .output}]}'
)
_CHOSEN = (
    f'{_TURNS}{{messages: (if (.chosen | type) == "array" and .chosen[0].role != "assistant" then .chosen '
    'else (.prompt // [] | turns("user")) + (.chosen | turns("assistant")) end)}'
)
_PREFERRED = "{messages: (.input.messages + (.preferred_output // .preferred_completion))}"
_TEXT = '{messages: [{role: "assistant", content: .text}]}'
_PREFERENCE = _preferred(_PREFERRED)
# (the fields that a row has, what it is)
_ROWS = (
    ({"conversations"}, _rewritten("The row is in ShareGPT's format (`conversations`).", _SHAREGPT)),
    ({"preferred_output"}, _PREFERENCE),
    ({"preferred_completion"}, _PREFERENCE),
    ({"non_preferred_output"}, _PREFERENCE),
    ({"chosen", "rejected"}, _preferred(_CHOSEN)),
    ({"instruction", "output"}, _rewritten("The row is in Alpaca's format (`instruction`, `output`).", _ALPACA)),
)
_PLAIN_TEXT = _rewritten(
    "The row is plain text (`text`), not a list of messages. Write out its turns, or learn all of it as one answer.",
    _TEXT,
)
_PARQUET = (
    "python3 -c 'import json, pyarrow.parquet as pq; [print(json.dumps(row, default=str)) for batch in "
    'pq.ParquetFile("old.parquet").iter_batches() for row in batch.to_pylist()]\' > new.jsonl'
)
_UTF_16 = "The file is UTF-16, not UTF-8."
_FROM_UTF_16 = "iconv -f UTF-16 -t UTF-8 old.jsonl > new.jsonl"
# (how the file begins, what it is, the command)
_SIGNATURES = (
    (b"PAR1", "The file is Parquet, not JSON Lines.", _PARQUET),
    (b"\x1f\x8b", "The file is packed with gzip.", "gunzip -c old.jsonl.gz > new.jsonl"),
    (b"PK\x03\x04", "The file is a zip archive.", "unzip -p old.zip > new.jsonl"),
    (b"\x28\xb5\x2f\xfd", "The file is packed with Zstandard.", "zstd -dc old.jsonl.zst > new.jsonl"),
    (b"\xff\xfe", _UTF_16, _FROM_UTF_16),
    (b"\xfe\xff", _UTF_16, _FROM_UTF_16),
    (b"{\x00", _UTF_16, "iconv -f UTF-16LE -t UTF-8 old.jsonl > new.jsonl"),
    (b"\x00{", _UTF_16, "iconv -f UTF-16BE -t UTF-8 old.jsonl > new.jsonl"),
)
