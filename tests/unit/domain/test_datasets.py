"""The rules of a dataset's rows, and the checker that applies them to a stream."""

from __future__ import annotations

import gc
import io
import itertools
import json
import pickle
import time
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.domain.datasets import (
    ChatExample,
    ChatMessage,
    DatasetChecker,
    DatasetLimits,
    DatasetReport,
    ProblemError,
    iterate_rows,
    parse_example,
)
from core.domain.errors import PayloadTooLargeError
from tests.unit.domain.dataset_rows import BAD_ROWS, GOOD, GOOD_ROWS, USER, assistant, row

SMALL = DatasetLimits(max_line_bytes=200, max_problems=3, max_counted_problems=5, max_examples=20)


def check(*chunks: bytes, limits: DatasetLimits | None = None) -> DatasetReport:
    checker = DatasetChecker(limits) if limits else DatasetChecker()
    for chunk in chunks:
        checker.feed(chunk)
    return checker.close()


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_line_path_and_code_and_says_what_to_change(name: str) -> None:
    line, code, path = BAD_ROWS[name]

    report = check(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")

    (problem,) = report.problems
    assert (problem.line, problem.code, problem.path) == (2, code, path)
    assert problem.message.endswith(".")
    assert problem.hint.endswith((".", " > new.jsonl"))
    assert len(problem.message) < 200
    assert (report.num_examples, report.num_problems, report.is_valid) == (2, 1, False)
    with pytest.raises(ProblemError) as raised:  # the trainer's reading agrees
        parse_example(line, line_number=2)
    assert raised.value.problem == problem


@pytest.mark.parametrize("name", GOOD_ROWS)
def test_a_good_row_is_accepted(name: str) -> None:
    report = check(GOOD_ROWS[name] + b"\n")
    assert (report.problems, report.num_examples, report.is_valid) == ((), 1, True)
    assert report.summarize() is None


def test_a_row_becomes_its_conversation() -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]}
    assert parse_example(row(system, USER, assistant(weight=0), assistant()), line_number=1) == ChatExample(
        messages=(
            ChatMessage("system", "Be kind."),
            ChatMessage("user", "Why?"),
            ChatMessage("assistant", "Because.", weight=0),
            ChatMessage("assistant", "Because.", weight=1),
        )
    )


@pytest.mark.parametrize("body", [b"", b"\xef\xbb\xbf"])
def test_a_file_without_rows_has_a_problem(body: bytes) -> None:
    report = check(body)
    assert not report.is_valid
    assert report.problems[0].code in {"no_examples", "empty_line"}


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_last_line_may_lack_its_line_feed(end: bytes) -> None:
    report = check(GOOD + b"\n" + GOOD + end)
    assert (report.num_examples, report.num_problems, report.size_bytes) == (2, 0, 2 * len(GOOD) + 1 + len(end))


BLANK_ENDS = [b"", b"\n", b"\n\n", b"\n\r\n \t\r\n", b"\n  ", b"\n" * 1000]


@pytest.mark.parametrize("end", BLANK_ENDS)
def test_blank_lines_at_the_end_of_a_file_are_nothing(end: bytes) -> None:
    report = check(GOOD + end, limits=SMALL)
    assert (report.num_examples, report.problems, report.is_complete) == (1, (), True)
    assert list(iterate_rows(io.BytesIO(GOOD + end))) == [(1, GOOD)]


def test_a_blank_line_before_a_row_is_told_by_its_number() -> None:
    body = b"\n" + GOOD + b"\n \n\n" + GOOD + b"\n\n"
    assert [(problem.line, problem.code) for problem in check(body).problems] == [
        (1, "empty_line"),
        (3, "empty_line"),
        (4, "empty_line"),
    ]
    assert list(iterate_rows(io.BytesIO(body))) == [(1, b""), (2, GOOD), (3, b""), (4, b""), (5, GOOD)]


@pytest.mark.parametrize("body", [b"\n", b" \n\t\n", b"\xef\xbb\xbf\r\n\n"])
def test_a_file_of_blank_lines_has_no_examples(body: bytes) -> None:
    assert [problem.code for problem in check(body).problems] == ["no_examples"]
    assert list(iterate_rows(io.BytesIO(body))) == []


def test_any_number_of_blank_lines_takes_no_memory_and_a_bounded_time() -> None:
    tracemalloc.start()
    report = check(*[b"\n" * 2**16] * 64, GOOD)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (report.num_problems, report.is_complete, report.num_examples) == (10_000, False, 0)
    assert peak_bytes < 8 * 2**20


@pytest.mark.fault(37)
@pytest.mark.parametrize("num_cut_bytes", [1, 10, len(GOOD) - 1])
def test_a_file_cut_in_its_last_line_is_told_so(num_cut_bytes: int) -> None:
    (problem,) = check(GOOD + b"\n" + GOOD[:-num_cut_bytes]).problems
    assert (problem.code, problem.line) == ("last_line_cut", 2)


def test_a_byte_order_mark_is_accepted_at_the_start_and_nowhere_else() -> None:
    mark = b"\xef\xbb\xbf"
    assert check(mark + GOOD).is_valid
    assert [problem.line for problem in check(mark + GOOD + b"\n" + mark + GOOD + b"\n").problems] == [2]
    assert check(mark + mark + GOOD + b"\n").problems[0].code == "bom_inside"
    assert check(GOOD.replace(b"Why", mark)).is_valid  # inside a string it is text


@pytest.mark.parametrize("chunk_bytes", [1, 7, 10_000])
def test_a_line_beyond_the_cap_refuses_the_upload_and_names_the_line(chunk_bytes: int) -> None:
    body = GOOD + b"\n" + b"x" * 201
    chunks = [body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes)]
    with pytest.raises(PayloadTooLargeError, match="Line 2") as raised:
        check(*chunks, limits=SMALL)
    assert raised.value.code == "line_too_long"
    assert check(GOOD.ljust(200) + b"\n", limits=SMALL).is_valid  # exactly the cap


def test_more_examples_than_may_be_refuse_the_upload() -> None:
    assert check(b"\n".join([GOOD] * 20), limits=SMALL).is_valid
    with pytest.raises(PayloadTooLargeError) as raised:
        check(b"\n".join([GOOD] * 21) + b"\n", limits=SMALL)
    assert raised.value.code == "too_many_examples"


@pytest.mark.fault(38)
def test_an_endless_line_never_takes_more_memory_than_the_cap() -> None:
    chunk = b'"' * 2**16
    tracemalloc.start()
    with pytest.raises(PayloadTooLargeError):
        check(*[chunk] * 200)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 3 * 2**20


LISTS = b"[" + b"[]," * 20  # more brackets than levels allowed, so that the depth is looked into
HOSTILE_LINES = {
    "an unended string of escaped quotes": LISTS + b'"' + rb"\"" * 500_000,
    "an unended string of quotes and backslashes": LISTS + b'"\\' * 500_000,
    "only quotes": LISTS + b'"' * 1_000_000,
    "only backslashes": LISTS + b"\\" * 1_000_000,
    "brackets and quotes": LISTS + b'["' * 500_000,
    "a huge integer": b"9" * 2**20,
    "a huge fraction": b"0." + b"9" * (2**20 - 2),
    "many fields": b"{" + b",".join(b'"%d":0' % number for number in range(90_000)) + b"}",
    "many fields, the last twice": b"{" + b",".join(b'"%d":0' % number for number in range(90_000)) + b',"0":0}',
    "many empty lists": b"[" + b"[]," * 300_000 + b"[]]",
    "many messages": row(*[{}] * 200_000),
    "a field with a huge name": b'{"' + b"\\u0000" * 170_000 + b'": 0}',
}


def cpu_seconds(body: bytes) -> float:
    """Return what checking costs, without the collector's walks over everything else that this process holds."""
    gc.disable()
    try:
        started = time.process_time()
        check(body)
        return time.process_time() - started
    finally:
        gc.enable()


@pytest.mark.fault(38)
@pytest.mark.parametrize("name", HOSTILE_LINES)
def test_a_hostile_line_costs_about_as_much_as_an_honest_one(name: str) -> None:
    line = HOSTILE_LINES[name] + b"\n"
    honest = (GOOD + b"\n") * (len(line) // len(GOOD))
    assert cpu_seconds(line) < 20 * cpu_seconds(honest)  # in quadratic time it would be many thousands
    report = check(line)
    assert report.num_problems == 1
    assert len(json.dumps(report.summarize())) < 500


def test_what_a_problem_says_can_be_stored_as_text_whatever_the_row_holds() -> None:
    body = b'{"\\u0000\\ud800": 0}\n' + row({"role": "\0\ud800" * 100, "content": ""}) + b"\n"
    for problem in check(body).problems:
        text = problem.path + problem.message + problem.hint
        assert text.isascii()
        assert "\0" not in text


def test_the_first_problems_are_kept_and_all_are_counted_until_there_are_too_many() -> None:
    few = check(b"x\n" * 4, limits=SMALL)
    assert ([problem.line for problem in few.problems], few.num_problems, few.is_complete) == ([1, 2, 3], 4, True)

    many = check(b"x\n" * 1000, limits=SMALL)
    assert (len(many.problems), many.num_problems, many.is_complete) == (3, 5, False)
    assert many.size_bytes == 2000


def test_the_summary_is_the_first_problem_and_the_number_of_the_others() -> None:
    assert check(GOOD + b"\n\n" + GOOD).summarize() == "Line 2: The line is empty. Remove it."
    assert check(GOOD + b"\n{'a'\n").summarize() == (
        "Line 2, column 2: This is not JSON: single quotes stand where JSON has double quotes. "
        "Write \"text\", not 'text'."
    )
    assert check(row(USER) + b"\n\n" + GOOD).summarize() == (
        "Line 1, messages: There is no assistant message. Add the answer to learn. And 1 more problem."
    )
    assert str(check(b"x\n" * 1000, limits=SMALL).summarize()).endswith("And at least 4 more problems.")


def test_a_problem_survives_the_way_to_another_process() -> None:
    with pytest.raises(ProblemError) as raised:
        parse_example(b"{}", line_number=3)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (copy.problem, str(copy)) == (raised.value.problem, str(raised.value))


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "weight", "type", "text", "x"]), inner)
    ),
    max_leaves=12,
)
FRAGMENTS = st.sampled_from(
    [b"\n", b"\r\n", b"{", b"}", b"[", b'"', b"\\", b"\\u0000", b"\\ud800", b"\xef\xbb\xbf", b"\xff", b"NaN", GOOD]
)
BODIES = (
    st.binary(max_size=400)
    | st.lists(FRAGMENTS | st.binary(max_size=8), max_size=30).map(b"".join)
    | st.lists(JSON_VALUES.map(lambda value: json.dumps(value).encode()), max_size=6).map(b"\n".join)
)


def outcome(chunks: Iterable[bytes]) -> DatasetReport | str:
    try:
        return check(*chunks, limits=SMALL)
    except PayloadTooLargeError as error:
        return f"{error.code}: {error.message}"


@pytest.mark.fault(39)
@given(body=BODIES, cuts=st.lists(st.integers(0, 400), max_size=8))
def test_any_bytes_are_checked_without_another_error_and_the_same_however_they_are_cut(
    body: bytes, cuts: list[int]
) -> None:
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    pieces = [body[start:end] for start, end in itertools.pairwise(edges)]
    whole = outcome([body])
    assert outcome(pieces) == whole
    assert outcome(body[index : index + 1] for index in range(len(body))) == whole


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
WORDS = TEXT.filter(lambda text: bool(text.strip()))
MESSAGES = st.builds(ChatMessage, st.sampled_from(["system", "user"]), TEXT) | st.builds(
    lambda text, weight: ChatMessage("assistant", text, weight), WORDS, st.sampled_from([0, 1])
)
EXAMPLES = st.builds(
    lambda before, answer, after: ChatExample((*before, ChatMessage("assistant", answer), *after)),
    st.lists(MESSAGES, max_size=5),
    WORDS,
    st.lists(MESSAGES, max_size=3),
)


def encode(example: ChatExample, *, is_ascii: bool) -> bytes:
    messages = [
        {"role": turn.role, "content": turn.content} | ({"weight": turn.weight} if turn.role == "assistant" else {})
        for turn in example.messages
    ]
    return json.dumps({"messages": messages}, ensure_ascii=is_ascii).encode()


@given(examples=st.lists(EXAMPLES, min_size=1, max_size=5), is_ascii=st.booleans())
def test_any_valid_rows_pass_and_come_back_as_they_were(examples: list[ChatExample], is_ascii: bool) -> None:
    lines = [encode(example, is_ascii=is_ascii) for example in examples]
    report = check(b"\n".join(lines) + b"\n")
    assert (report.problems, report.num_examples) == ((), len(examples))
    assert [parse_example(line, line_number=number) for number, line in enumerate(lines, 1)] == examples
