"""Tables fold where a reader would, and leave out the least important columns on a narrow terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cli.commands.jobs import JOB_COLUMNS
from cli.output import make_table
from cli.pool_names import PoolNames
from cli.tables import Column
from core.domain.errors import NotFoundError

ID = "ftjob-01a21fd1d4b07393b3c86a8924762485"
POOL = "SmolLM2-135M-Instruct@none"
JOB = {
    "id": ID,
    "tenant": "research-and-development-eu",
    "pool": POOL,
    "status": "running",
    "steps": "10/45000",
    "age": "2h05m",
    "worker": "gpu-node-17.cluster.internal-0",
}


def draw(columns: tuple[str | Column, ...], rows: list[dict[str, str]], width: int) -> list[str]:
    told = io.StringIO()
    Console(file=told, width=width).print(make_table(columns, rows))
    return [line.rstrip() for line in told.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 90, 99, 100, 120, 200])
def test_a_table_is_as_wide_as_it_may_be_and_no_heading_folds(width: int) -> None:
    lines = draw(JOB_COLUMNS, [JOB], width)
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["id", "tenant", "pool", "status", "steps", "age", "worker"][: len(lines[0].split())]
    assert len(lines[0].split()) >= (7 if width >= 120 else 5)
    assert len(lines) <= 5
    assert lines[1].startswith(ID)


def test_a_value_folds_behind_a_mark_and_not_within_a_word() -> None:
    assert draw(("pool",), [{"pool": POOL}], 25) == ["pool", "SmolLM2-135M-Instruct@", "none"]
    assert draw(("pool",), [{"pool": POOL}], 13) == ["pool", "SmolLM2-135M-", "Instruct@none"]
    assert draw(("at",), [{"at": "2026-11-28 01:43:11"}], 12) == ["at", "2026-11-28", "01:43:11"]


def test_a_word_is_cut_into_lines_only_where_nothing_else_helps_and_loses_nothing() -> None:
    lines = draw(("tenant", "pool"), [{"tenant": "x" * 30, "pool": POOL}], 20)
    assert max(map(len, lines)) <= 20
    assert "".join(lines).count("x") == 30


def test_a_heading_of_several_words_folds_between_them() -> None:
    assert draw((Column("a", "GPU s a month"),), [{"a": "5"}], 8) == ["GPU s a", "month", "5"]


def test_lines_of_a_value_stay_lines() -> None:
    assert draw(("a", "b"), [{"a": "1\n22", "b": ""}], 80) == ["a   b", "1", "22"]


def test_a_pool_is_named_without_its_owner_unless_another_would_read_alike() -> None:
    names = PoolNames(["acme/small@none", "acme/small@nf4", "else/small@nf4", "plain@none"])
    assert [names.shorten(each) for each in ("acme/small@none", "acme/small@nf4", "plain@none", "new/one@none")] == [
        *("small@none", "acme/small@nf4", "plain@none"),
        "new/one@none",
    ]
    assert (names.find("small@none"), names.find("else/small@nf4")) == ("acme/small@none", "else/small@nf4")
    for unknown in ("small@nf4", "nothing"):
        with pytest.raises(NotFoundError, match="There is no pool"):
            names.find(unknown)
