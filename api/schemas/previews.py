"""The request and the answer of a file's preview."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from core.domain import bounds
from core.domain.datasets.statistics import PreviewRow, RowProblem, TokenBucket, TokenReport


class CreatePreview(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=200)
    from_line: int = Field(default=1, ge=1, le=10_000_000)
    rows: int = Field(default=5, ge=1, le=50)
    max_seq_len: Annotated[int, bounds.SEQ_LEN.field] | None = None


class TokenStatistics(BaseModel):
    """Counts over the rows that were read: all of the file, or its first ones from `from_line` on."""

    num_rows: int
    num_tokens: int
    num_learnt_tokens: int
    longest_row_tokens: int
    num_truncated: int
    num_nothing_to_learn: int
    num_left_out_turns: int
    histogram: list[TokenBucket]
    num_problems: int
    is_whole_file: bool


class PreviewObject(BaseModel):
    object: str = "file.preview"
    file_id: str
    model: str
    max_seq_len: int
    data: list[PreviewRow]
    problems: list[RowProblem]
    statistics: TokenStatistics

    @classmethod
    def of(cls, report: TokenReport, *, is_whole_file: bool, file_id: str, model: str) -> PreviewObject:
        counted = report.model_dump(include=TokenStatistics.model_fields.keys() - {"is_whole_file"})
        return cls(
            file_id=file_id,
            model=model,
            max_seq_len=report.max_seq_len,
            data=report.rows,
            problems=report.problems,
            statistics=TokenStatistics(**counted, is_whole_file=is_whole_file),
        )
