"""Rows from real tools: exports with null columns are read, and other formats are named with a conversion."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jq
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.domain.datasets import DatasetChecker, DatasetReport, ProblemError, iterate_rows, parse_example
from core.domain.json_faults import explain_json_error, is_cut
from tests.public_rows import ANSWER, PUBLIC_FILES, USER

GOOD = json.dumps({"messages": [USER, ANSWER]}).encode()


def check(body: bytes) -> DatasetReport:
    checker = DatasetChecker()
    checker.feed(body)
    return checker.close()


@pytest.mark.parametrize("name", PUBLIC_FILES)
def test_a_file_as_public_tools_write_it_is_accepted_by_the_checker_and_by_the_rows_reader(name: str) -> None:
    report = check(PUBLIC_FILES[name])
    assert (report.problems, report.is_valid) == ((), True)
    rows = [parse_example(line, line_number=number) for number, line in iterate_rows(io.BytesIO(PUBLIC_FILES[name]))]
    assert len(rows) == report.num_examples > 0


LISTS = ["tools", "functions", "tool_calls", "annotations"]
ROW_FIELDS = ["tools", "parallel_tool_calls", "functions", "an unknown column"]
MESSAGE_FIELDS = [
    "name",
    "weight",
    "refusal",
    "audio",
    "annotations",
    "function_call",
    "tool_calls",
    "tool_call_id",
    "x",
]
PART_FIELDS = ["image_url", "refusal", "input_audio"]


def absent(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Return any of the fields as null, or as an empty list where that says nothing."""
    return st.fixed_dictionaries(
        {}, optional={name: st.sampled_from([None, []]) if name in LISTS else st.none() for name in names}
    )


@given(data=st.data(), role=st.sampled_from(["user", "system"]))
def test_a_row_with_absent_fields_is_the_row_without_them(data: st.DataObject, role: str) -> None:
    part: dict[str, Any] = {"type": "text", "text": "Why?"}
    first: dict[str, Any] = {"role": role, "content": [part]}
    bare = {"messages": [first, ANSWER]}
    decorated = {
        "messages": [
            first | {"content": [part | data.draw(absent(PART_FIELDS))]} | data.draw(absent(MESSAGE_FIELDS)),
            ANSWER | data.draw(absent(MESSAGE_FIELDS)),
        ]
    } | data.draw(absent(ROW_FIELDS))
    assert parse_example(json.dumps(decorated).encode(), line_number=1) == parse_example(
        json.dumps(bare).encode(), line_number=1
    )


@pytest.mark.parametrize(("written", "weight"), [(1.0, 1), (0.0, 0), (1, 1), (0, 0), (None, 1)])
def test_a_weight_is_read_as_a_table_writes_it(written: float | None, weight: int) -> None:
    row = {"messages": [USER, ANSWER | {"weight": written}, ANSWER]}
    message = parse_example(json.dumps(row).encode(), line_number=1).messages[1]
    assert (message.weight, type(message.weight)) == (weight, int)


@pytest.mark.parametrize("field", ["refusal", "audio", "annotations", "tool_calls"])
def test_a_value_that_cannot_be_learnt_is_refused_in_words_of_its_own(field: str) -> None:
    value: Any = [{"type": "x"}]
    with pytest.raises(ProblemError, match=f"`{field}`: ") as refused:
        parse_example(json.dumps({"messages": [USER, ANSWER | {field: value}]}).encode(), line_number=1)
    assert refused.value.problem.code == "not_supported"
    assert ("tool calls" in refused.value.problem.message) == (field == "tool_calls")


CHAT = [{"role": "user", "content": "Why?"}]
BEST, WORST = [{"role": "assistant", "content": "Because."}], [{"role": "assistant", "content": "No."}]

FOREIGN_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "ShareGPT": (
        {"id": "1", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        "ShareGPT",
    ),
    "ShareGPT with a system message": (
        {
            "system": "Be kind.",
            "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}],
        },
        "ShareGPT",
    ),
    "conversations of roles": ({"conversations": [*CHAT, *BEST]}, "ShareGPT"),
    "Alpaca": ({"instruction": "Why", "input": "so?", "output": "Because."}, "Alpaca"),
    "Alpaca without input": ({"instruction": "Why?", "output": "Because."}, "Alpaca"),
    "Alpaca with an empty input": ({"instruction": "Why?", "input": "", "output": "Because."}, "Alpaca"),
    "prompt and completion": ({"prompt": "Why?", "completion": "Because."}, "`prompt` and `completion`"),
    "prompt and completion as messages": ({"prompt": CHAT, "completion": BEST}, "`prompt` and `completion`"),
    "question and answer": ({"question": "Why?", "answer": "Because."}, "`question` and `answer`"),
    "messages null": ({"messages": None, "prompt": "Why?", "completion": "Because."}, "`prompt` and `completion`"),
    "text": ({"text": "Why? Because."}, "plain text"),
    "DPO": ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, "preference data (DPO)"),
    "DPO as messages": ({"prompt": CHAT, "chosen": BEST, "rejected": WORST}, "preference data (DPO)"),
    "DPO of whole conversations": (
        {"prompt": "Why?", "chosen": CHAT + BEST, "rejected": CHAT + WORST},
        "preference data (DPO)",
    ),
    "OpenAI's DPO": (
        {"input": {"messages": CHAT}, "preferred_output": BEST, "non_preferred_output": WORST},
        "preference data (DPO)",
    ),
    "OpenAI's older DPO": (
        {"input": {"messages": CHAT}, "preferred_completion": BEST, "non_preferred_completion": WORST},
        "preference data (DPO)",
    ),
}


def run_jq(command: str, text: str) -> bytes:
    """Run the program of a hint, as `jq -c` does."""
    name, compact, program, source, arrow, target = shlex.split(command)
    assert (name, compact, arrow, target) == ("jq", "-c", ">", "new.jsonl")
    assert source in {"old.json", "old.jsonl"}
    written = jq.compile(program).input_text(text, slurp=False).text()
    return f"{written}\n".encode()


@pytest.mark.parametrize("name", FOREIGN_ROWS)
def test_a_foreign_row_is_named_and_its_command_makes_a_row_of_it(name: str) -> None:
    row, words = FOREIGN_ROWS[name]
    report = check(f"{json.dumps(row)}\n".encode() * 2)
    assert [(problem.line, problem.path, problem.code) for problem in report.problems] == [
        (1, "", "foreign_format"),
        (2, "", "foreign_format"),
    ]
    problem = report.problems[0]
    assert words in problem.message
    assert str(report.summarize()).endswith("new.jsonl (and 1 more problem)")
    converted = check(run_jq(problem.hint, json.dumps(row) * 2))
    assert (converted.problems, converted.num_examples) == ((), 2)


@pytest.mark.skipif(shutil.which("jq") is None, reason="this machine has no jq; its library runs the same programs")
@pytest.mark.parametrize("name", FOREIGN_ROWS)
def test_the_command_runs_as_it_stands_in_a_shell(name: str, tmp_path: Path) -> None:
    text = f"{json.dumps(FOREIGN_ROWS[name][0])}\n"
    (tmp_path / "old.jsonl").write_text(text)
    subprocess.run(check(text.encode()).problems[0].hint, shell=True, cwd=tmp_path, check=True)
    converted = check((tmp_path / "new.jsonl").read_bytes())
    assert (converted.problems, converted.num_examples) == ((), 1)


def test_a_converted_row_keeps_its_words() -> None:
    row = FOREIGN_ROWS["Alpaca"][0]
    (problem,) = check(json.dumps(row).encode()).problems
    example = parse_example(run_jq(problem.hint, json.dumps(row)), line_number=1)
    assert [(turn.role, turn.content) for turn in example.messages] == [
        ("user", "Why\n\nso?"),
        ("assistant", "Because."),
    ]


def packed() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("rows.jsonl", GOOD + b"\n")
    return out.getvalue()


MANY = [json.loads(GOOD)] * 3
FOREIGN_FILES = {
    "an array on one line": (json.dumps(MANY).encode(), "one JSON array"),
    "an array beyond the longest line": (json.dumps(MANY * 5000).encode(), "one JSON array"),
    "an array, pretty-printed": (json.dumps(MANY, indent=2).encode(), "one JSON array"),
    "an array, a row a line": (b"[" + b",\n".join([GOOD] * 3) + b"]", "one JSON array"),
    "an object, pretty-printed": (json.dumps(MANY[0], indent=2).encode(), "pretty-printed"),
    "objects, pretty-printed": (json.dumps(MANY[0], indent=2).encode() * 2, "pretty-printed"),
    "CSV": (b'prompt,completion\n"Why, then?",Because.\nHow?,So.\n', "CSV"),
    "CSV of Excel": (b"\xef\xbb\xbfprompt;completion\r\nWhy?;Because.\r\n", "CSV"),
    "TSV": (b"question\tanswer\nWhy?\tBecause.\n", "CSV"),
    "CSV of Alpaca's columns": (b"instruction,input,output\nWhy,so?,Because.\nWhy?,,So.\n", "CSV"),
    "CSV of messages": (b'id,messages\n1,"' + GOOD[13:-1].replace(b'"', b'""') + b'"\n', "CSV"),
    "Parquet": (b"PAR1\x15\x04\n" + b"\0" * 40 + b"PAR1", "Parquet"),
    "gzip": (gzip.compress(GOOD + b"\n"), "gzip"),
    "zip": (packed(), "zip"),
    "Zstandard": (b"\x28\xb5\x2f\xfd\x00\n\n", "Zstandard"),
    "UTF-16": ((GOOD + b"\n").decode().encode("utf-16"), "UTF-16"),
    "UTF-16 of the other order": (b"\xfe\xff" + (GOOD + b"\n").decode().encode("utf-16-be"), "UTF-16"),
    "UTF-16 without a mark": ((GOOD + b"\n").decode().encode("utf-16-le"), "UTF-16"),
}


@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_a_foreign_file_is_named_once_and_nothing_more_is_read(name: str) -> None:
    body, words = FOREIGN_FILES[name]
    report = check(body)
    assert (report.num_problems, report.is_complete, report.size_bytes) == (1, False, len(body))
    (problem,) = report.problems
    assert (problem.line, problem.path, problem.code) == (1, "", "foreign_format")
    assert words in problem.message
    assert problem.hint.endswith(" > new.jsonl")
    assert "\n" not in problem.hint
    assert report.summarize() == f"Line 1: {problem.message} {problem.hint}"


@pytest.mark.parametrize(
    "name", [name for name, (_, words) in FOREIGN_FILES.items() if "JSON a" in words or "pretty" in words]
)
def test_json_that_is_not_lines_becomes_lines_by_its_command(name: str) -> None:
    body = FOREIGN_FILES[name][0]
    converted = check(run_jq(check(body).problems[0].hint, body.decode()))
    assert converted.is_valid
    assert converted.num_examples == body.count(b'"messages"')


COMMANDS = {"CSV": "old.csv", "TSV": "old.csv", "gzip": "old.jsonl.gz", "UTF-16": "old.jsonl"}


@pytest.mark.parametrize(
    "name",
    [name for name in FOREIGN_FILES if name.split(maxsplit=1)[0] in COMMANDS],
    ids=lambda name: name.replace(" ", "-"),
)
def test_a_file_of_bytes_becomes_lines_by_its_command(name: str, tmp_path: Path) -> None:
    body = FOREIGN_FILES[name][0]
    (tmp_path / COMMANDS[name.split(maxsplit=1)[0]]).write_bytes(body)
    command = check(body).problems[0].hint.replace("python3", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    converted = check((tmp_path / "new.jsonl").read_bytes())
    assert (converted.problems, converted.num_examples > 0) == ((), True)


def test_parquet_becomes_lines_by_its_command(tmp_path: Path) -> None:
    rows = [json.loads(GOOD), {"messages": [USER, ANSWER | {"weight": 1.0}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "old.parquet")
    report = check((tmp_path / "old.parquet").read_bytes())
    command = report.problems[0].hint.replace("python3", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    converted = check((tmp_path / "new.jsonl").read_bytes())
    assert (converted.problems, converted.num_examples) == ((), 2)


def test_columns_nobody_knows_are_told_what_to_be_called_and_stand_in_no_command() -> None:
    assert check(b"text,label $(reboot)\n").problems[0].code == "not_json"
    (problem,) = check(b"text,label\na,b\n").problems
    assert "`prompt` and `completion`" in problem.message
    assert "label" not in problem.hint


@pytest.mark.parametrize("line", [b"hello", b"hello, world", b"[]", b"[1, 2]", b"{}", b"1,2", GOOD + b","])
def test_what_is_no_known_format_is_not_called_one(line: bytes) -> None:
    assert {problem.code for problem in check(line + b"\n" + GOOD).problems}.isdisjoint({"foreign_format"})


def test_a_foreign_file_keeps_its_kind_on_the_way_to_another_process() -> None:
    with pytest.raises(ProblemError) as raised:
        parse_example(b"[", line_number=1)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (type(copy), copy.problem) == (type(raised.value), raised.value.problem)


JSON_FAULTS = {
    # the row, the column, words of the message, words of the hint
    "single quotes": ("{'messages': []}", 2, "single quotes", "double"),
    "single quotes around a value": ('{"messages": \'a\'}', 14, "single quotes", "double"),
    "None": ('{"messages": None}', 14, "None is Python's", "Write null"),
    "True": ('{"messages": [True]}', 15, "True is Python's", "Write true"),
    "a comma before a bracket": ('{"messages": [1,]}', 17, "a comma stands before a closing bracket", "Remove"),
    "a comma before a brace": ('{"messages": 1,}', 16, "a comma stands before a closing bracket", "Remove"),
    "two objects": ('{"a": 1} {"a": 2}', 10, "a second value begins", "a line of its own"),
    "a comma after an object": ('{"a": 1},', 9, "a comma stands after the object", "Remove"),
    "words after an object": ('{"a": 1} end', 10, "something stands after", "Remove"),
    "a bare tab": ('{"a": "b\tc"}', 9, "control character (U+0009)", "\\t"),
    "a bare bell": ('{"a": "b\x07c"}', 9, "control character (U+0007)", "\\u0007"),
    "a bad escape": ('{"a": "C:\\data"}', 10, "a backslash", "as two"),
    "a bad code": ('{"a": "\\u12x4"}', 9, "four hexadecimal digits", "as two"),
    "a missing comma": ('{"a": 1 "b": 2}', 9, "a comma is missing", "comma"),
    "a bare quote": ('{"a": "say "hi""}', 13, "a quote inside a string", '\\"'),
    "a missing colon": ('{"a" 1}', 6, "a colon is missing", '"name": value'),
    "a bare name": ("{messages: []}", 2, "a field's name stands without quotes", "double quotes"),
    "a bare word": ('{"a": word}', 7, "a value stands without quotes", "double quotes"),
    "no value": ('{"a": }', 7, "a value is missing", "Write it"),
    "a string without an end": ('{"a": "b', 7, "never ends", "Close it"),
    "an object without an end": ('{"a": 1', 8, "the text ends", "Close"),
}  # fmt: skip


@pytest.mark.parametrize("name", JSON_FAULTS)
def test_what_is_wrong_with_json_is_told_in_words_by_line_and_column(name: str) -> None:
    text, column, words, hint = JSON_FAULTS[name]
    problem = check(GOOD + b"\n\n" + text.encode() + b"\n" + GOOD).problems[1]
    assert (problem.line, problem.path, problem.code) == (3, f"column {column}", "not_json")
    assert words in problem.message
    assert hint in problem.hint.replace('"text"', "double")
    assert f"Line 3, column {column}: {problem.message} {problem.hint}" == str(ProblemError(problem))


@given(text=st.text(st.sampled_from("{}[]\"':,\\u0aNT \t\x01-.é"), max_size=30))
def test_every_error_of_json_has_words(text: str) -> None:
    try:
        json.JSONDecoder().decode(text)
    except json.JSONDecodeError as error:
        fault = explain_json_error(error)
        assert fault.hint.endswith(".")
        assert not re.search("Expecting|delimiter", fault.what)
        assert (fault.line, fault.column) == (1, error.pos + 1)
        assert is_cut(error) in {True, False}


ROWS = st.builds(
    lambda words, weight: json.dumps(
        {"messages": [{"role": "user", "content": words}, ANSWER | {"weight": weight}], "tools": None},
        ensure_ascii=False,
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    st.sampled_from([1, 1.0, None]),
)


@pytest.mark.parametrize(
    "cut", [b'{"a": 1.', b'{"a": 1e', b'{"a": 15E-', b'{"a": -', b'{"a": tru', b'{"a": "\\u00', b'{"a": "\\']
)
def test_a_value_cut_in_two_is_told_to_be_cut(cut: bytes) -> None:
    assert [problem.code for problem in check(cut).problems] == ["last_line_cut"]


@given(row=ROWS | ROWS.map(lambda row: json.dumps(json.loads(row))), data=st.data())
def test_a_row_cut_anywhere_is_told_to_be_cut(row: str, data: st.DataObject) -> None:
    whole = row.encode()
    cut = whole[: data.draw(st.integers(1, len(whole) - 1))]
    for body in (cut, GOOD + b"\n" + cut):
        assert [problem.code for problem in check(body).problems] == ["last_line_cut"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{'messages': []}", "not_json"),
        (b'{"messages": [],}', "not_json"),
        (b'{"messages": None}', "not_json"),
        (b'{"messages": "\\d', "not_json"),
        (b"hello", "not_json"),
        (GOOD + b",", "not_json"),
        (GOOD.replace(b"France", b"\xff"), "not_utf8"),
        (b'{"messages": []}', "messages_missing"),
    ],
)
def test_another_fault_of_the_last_line_keeps_its_own_words(line: bytes, code: str) -> None:
    assert [problem.code for problem in check(GOOD + b"\n" + line).problems] == [code]
