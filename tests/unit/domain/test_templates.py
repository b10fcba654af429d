"""Chat templates render as in transformers, and are stopped at the limits of their process."""

from __future__ import annotations

import copy
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from core.domain.datasets.statistics import NumberedLine, TokenReport
from core.domain.datasets.tokenizers import BaseTokenizer, RenderingError, TokenizerBundle
from core.previews import PreviewLimitError, PreviewLimits, preview_lines
from tests.bundles import letters_bundle, load_smollm2_tokenizer
from tests.waiting import takes_at_least, wait_until
from worker.trainer.datasets import read_examples, tokenize_dataset
from worker.trainer.tokenizers import describe_tokenizer

LOOKING_INTO_OTHERS = 1 << 19 | 1 << 21 | 1 << 38  # CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON
TURNS = [
    {"role": "system", "content": "Sei kurz."},
    {"role": "user", "content": 'Où? "<b>" & {{ 7 }} 🙂'},
    {"role": "assistant", "content": "Là."},
]
FEATURES = {
    "its own": None,
    "white space control": "{%- for m in messages -%}\n  {{ m.content }}  {%- endfor %}\n\n{% if true %}\n x\n{% endif %}",
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m.content | tojson(indent=2) }}{% endfor %}",
    "namespace": "{% set n = namespace(seen=0) %}{% for m in messages %}{% set n.seen = n.seen + 1 %}{% endfor %}{{ n.seen }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}",
    "dict": "{% set d = dict(a=1) %}{{ d.a }}{{ dict.fromkeys(['x'])|tojson }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{% if tools is none %}no tools{% endif %}",
    "methods and slices": "{% for m in messages[::-1] %}{{ m['content'].upper().split(' ')[0] }}{{ m.role[:2] }}{% endfor %}",
    "macros": "{% macro say(x) %}[{{ x|trim }}]{% endmacro %}{% for m in messages %}{{ say(m.content) }}{% endfor %}",
    "generation prompt": "{% if add_generation_prompt %}no{% else %}yes{% endif %}",
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_template_writes_what_transformers_writes(name: str) -> None:
    tokenizer = copy.copy(load_smollm2_tokenizer())
    if FEATURES[name] is not None:
        tokenizer.chat_template = FEATURES[name]
    base = BaseTokenizer(describe_tokenizer(tokenizer))
    assert base.render(TURNS) == tokenizer.apply_chat_template(TURNS, tokenize=False)


def test_a_bundle_tokenises_as_transformers_does() -> None:
    tokenizer = load_smollm2_tokenizer()
    base = BaseTokenizer(describe_tokenizer(tokenizer))
    pieces = ["Hello  world", "<|im_start|>user\n", "Où? 🙂 \t", "", " x <|im_end|>"]
    theirs = tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True)
    assert [each.token_ids for each in base.encode(pieces)] == theirs["input_ids"]
    assert [each.offsets for each in base.encode(pieces)] == [
        list(map(tuple, each)) for each in theirs["offset_mapping"]
    ]


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{% set n = namespace(_x=1) %}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{% for %}",
        "{{ range(10**9) }}",
    ],
)
def test_a_template_that_reaches_out_or_breaks_is_refused(template: str) -> None:
    base = BaseTokenizer(letters_bundle(template))
    with pytest.raises(RenderingError):
        assert base.render(TURNS) == ""  # what the sandbox makes undefined is written as nothing
        raise RenderingError


ROW = json.dumps({"messages": TURNS}).encode()


def write(bundle: TokenizerBundle, directory: Path) -> Path:
    path = directory / "bundle.json"
    path.write_text(bundle.model_dump_json())
    return path


LIMITS = PreviewLimits(cpu_seconds=2, wall_seconds=60.0, memory_bytes=2**29, answer_bytes=2**16)


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{{ 9**(9**8) }}",
        "{{ 'x' * 500000000 }}",
        "{{ (messages | string) * 90000000 }}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ 'x'.ljust(900000000) }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}" + "{{ 'word ' * 100000 }}",
    ],
    ids=["loops", "power", "string", "repeat", "doubling", "format", "justify", "output"],
)
def test_a_template_is_stopped_at_the_limits(template: str, tmp_path: Path) -> None:
    path = write(letters_bundle(template), tmp_path)
    before = children_cpu_seconds()
    try:
        report = preview_lines(
            path, [NumberedLine(number=1, content=ROW)], max_seq_len=10**6, num_shown=1, limits=LIMITS
        )
    except PreviewLimitError:
        pass
    else:
        assert [problem.code for problem in report.problems] == ["template_refused"]
    assert children_cpu_seconds() - before < LIMITS.cpu_seconds + 1


def test_a_child_that_only_waits_is_killed_by_the_clock(tmp_path: Path) -> None:
    pipe = tmp_path / "never"
    os.mkfifo(pipe)
    with takes_at_least(1.5), pytest.raises(PreviewLimitError):
        preview_lines(pipe, [], max_seq_len=8, num_shown=1, limits=PreviewLimits(wall_seconds=1.5))


def test_a_child_reads_its_rows_within_its_memory(tmp_path: Path) -> None:
    path = write(letters_bundle(), tmp_path)
    rows = [NumberedLine(number=number, content=b"x" * 2**20) for number in range(1, 129)]
    limits = PreviewLimits(memory_bytes=2**27)
    with pytest.raises(PreviewLimitError, match="128 MiB of memory"):
        preview_lines(path, rows, max_seq_len=8, num_shown=1, limits=limits)


def test_a_child_is_limited_before_its_order_comes() -> None:
    argv = [sys.executable, "-m", "core.previews", "5", str(2**27)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        wait_until(lambda: psutil.Process(child.pid).rlimit(psutil.RLIMIT_AS) == (2**27, 2**27))
        assert child.poll() is None, "it waits for its order"
        child.kill()


def test_a_child_has_no_credential_and_may_not_look_into_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_DATABASE_URL", "postgresql://espalier_api:hush@db/espalier")
    pipe = tmp_path / "never"
    os.mkfifo(pipe)  # the child waits in it
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(preview_lines, pipe, [], max_seq_len=8, num_shown=1)
        child = wait_for_child("core.previews")
        environment = Path(f"/proc/{child.pid}/environ").read_text()
        child.kill()
        with pytest.raises(PreviewLimitError):
            waiting.result()
    assert "hush" not in environment


def wait_for_child(module: str) -> psutil.Process:
    """Return the child that runs a module, once it has no right to look into others, and can gain none."""
    found: list[psutil.Process] = []

    def is_there() -> bool:
        found[:] = [child for child in psutil.Process().children() if is_confined(child, module)]
        return bool(found)

    wait_until(is_there)
    return found[0]


def is_confined(child: psutil.Process, module: str) -> bool:
    try:
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        facts = dict(line.split(":\t", 1) for line in lines)
        may_look = int(facts["CapEff"], 16) & LOOKING_INTO_OTHERS
        return module in child.cmdline() and facts["NoNewPrivs"] == "1" and not may_look
    except (psutil.Error, FileNotFoundError):
        return False


def test_a_preview_is_what_the_trainer_makes_token_for_token(tmp_path: Path) -> None:
    """The child of a preview beside the trainer's own way from the file to the engine's examples."""
    rows = [
        TURNS,
        [{"role": "user", "content": "spell <|im_end|> it"}, {"role": "assistant", "content": " I <|im_start|> do\n"}],
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "First.", "weight": 0},
         {"role": "user", "content": "two"}, {"role": "assistant", "content": "Second 🙂🙂."}],
        [{"role": "user", "content": "long " * 80}, {"role": "assistant", "content": "cut off"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 100}],
    ]  # fmt: skip
    lines = [json.dumps({"messages": row}).encode() for row in rows]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    bundle = describe_tokenizer(load_smollm2_tokenizer())
    trained = tokenize_dataset(BaseTokenizer(bundle), read_examples(file), max_seq_len=64)

    numbered = [NumberedLine(number=number, content=line) for number, line in enumerate(lines, start=1)]
    report = preview_lines(write(bundle, tmp_path), numbered, max_seq_len=64, num_shown=50)

    learnt = [row for row in report.rows if any(row.loss_mask)]
    assert [row.token_ids for row in learnt] == [example.token_ids.tolist() for example in trained.examples]
    assert [row.loss_mask for row in learnt] == [example.is_label.astype(int).tolist() for example in trained.examples]
    counts = trained.counts
    assert (report.num_truncated, report.num_nothing_to_learn) == (counts.num_truncated, counts.num_dropped) == (2, 1)
    assert report.num_tokens == sum(len(row.token_ids) for row in report.rows)
    assert sum(bucket.num_rows for bucket in report.histogram) == report.num_rows == 5
    shown = report.rows[1]
    assert (
        "".join(token for token, learns in zip(shown.tokens, shown.loss_mask, strict=True) if learns)
        == " I <|im_start|> do\n<|im_end|>"
    )


def test_rows_that_cannot_be_read_or_rendered_are_told_by_line(tmp_path: Path) -> None:
    refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    good = json.dumps({"messages": TURNS[1:]}).encode()
    lines = [NumberedLine(number=n, content=c) for n, c in ((7, ROW), (8, b"\xff{"), (9, good))]
    report = preview_lines(write(letters_bundle(refusing), tmp_path), lines, max_seq_len=64, num_shown=3)
    assert [(problem.line, problem.code) for problem in report.problems] == [(7, "template_refused"), (8, "not_utf8")]
    assert [row.line for row in report.rows] == [9]


def test_reports_on_parts_join_to_the_report_on_the_whole(tmp_path: Path) -> None:
    path = write(letters_bundle(), tmp_path)
    lines = [
        NumberedLine(
            number=n, content=json.dumps({"messages": [{"role": "user", "content": "x" * n * 3}, TURNS[2]]}).encode()
        )
        for n in range(1, 30)
    ]

    def report(part: list[NumberedLine]) -> TokenReport:
        return preview_lines(path, part, max_seq_len=70, num_shown=0)

    assert TokenReport.joined([report(lines[:11]), report(lines[11:])]) == report(lines)
