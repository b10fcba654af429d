"""`espalier validate`: the report of an upload, without a service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from core.domain.datasets.tokenizers import tokenizer_path
from tests.bundles import letters_bundle

GOOD = json.dumps({"messages": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "ABC"}]})


def run(tmp_path: Path, content: str, *options: str) -> tuple[int, str]:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    done = CliRunner().invoke(app, ["validate", str(file), "--data-dir", str(tmp_path), *options])
    return done.exit_code, " ".join(done.output.split())


def test_a_good_file_passes_and_its_duplicates_are_counted(tmp_path: Path) -> None:
    code, told = run(tmp_path, f"{GOOD}\n{GOOD}\n")
    assert code == 0
    assert "Good rows: 2. Problems: 0. It can be trained on." in told
    assert "1 of the first 2 good rows repeat an earlier one." in told


def test_problems_are_a_table_and_an_exit_code(tmp_path: Path) -> None:
    code, told = run(tmp_path, f"{GOOD}\nnot json\n")
    assert code == 1
    assert "cannot be trained on" in told
    assert "not_json" in told


def test_the_command_that_converts_a_file_stands_on_a_line_of_its_own_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    file.write_text(f"{row}\n{row}\n")
    lines = CliRunner().invoke(app, ["validate", str(file)], terminal_width=60).output.splitlines()
    (command,) = [line for line in lines if line.startswith("jq ")]
    assert command.endswith(" old.jsonl > new.jsonl")


@pytest.mark.parametrize(
    ("max_seq_len", "code", "words"), [("64", 0, "0 rows are longer"), ("8", 1, "1 of all have nothing left")]
)
def test_tokens_are_counted_as_a_local_base_sees_them(tmp_path: Path, max_seq_len: str, code: int, words: str) -> None:
    bundle = tokenizer_path(tmp_path / "cache", "acme/base")
    bundle.parent.mkdir(parents=True)
    bundle.write_text(letters_bundle().model_dump_json())
    done, told = run(tmp_path, GOOD, "--base-model", "acme/base", "--max-seq-len", max_seq_len)
    assert done == code
    assert words in told


def test_a_base_that_no_worker_has_loaded_cannot_be_counted(tmp_path: Path) -> None:
    code, told = run(tmp_path, GOOD, "--base-model", "acme/base")
    assert code == 2
    assert "no worker of this data directory has loaded it" in told
