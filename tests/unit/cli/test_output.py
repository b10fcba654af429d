"""Sentences are printed literally: a user's words are neither markup nor names of emojis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from rich.panel import Panel

from cli.commands.datasets import validate
from cli.output import fail, output_mode, print_rows, say, show, tell

ODD = r"redis://host:abc: [red]a[/] [/b] :warning: c:\[x] \ "


def test_a_sentence_is_said_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    say(ODD, style="green")
    assert capsys.readouterr().out == f"{ODD}\n"


def test_a_line_on_standard_error_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    tell(ODD)
    with pytest.raises(typer.Exit):
        fail(ODD)
    assert capsys.readouterr().err == f"{ODD.strip()}\n" * 2


def test_no_emoji_is_made_of_rows_and_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(("name",), [{"name": ODD}])
    show(Panel("host:abc:"))
    printed = capsys.readouterr().out
    assert ODD.strip() in printed
    assert "host:abc:" in printed.splitlines()[-2]


def test_what_is_wrong_in_a_dataset_is_quoted_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"messages": [{"role": "[/b]:abc:", "content": "x"}]}, {"[/b]:abc:": 1}]
    file.write_text("\n".join(map(json.dumps, rows)))
    with output_mode(is_json=False), pytest.raises(typer.Exit):
        validate(file)
    assert capsys.readouterr().out.count("'[/b]:abc:'") == len(rows)
