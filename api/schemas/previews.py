"""The request and the answer of a file's preview."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from api.schemas.openai.files import RowProblem
from api.schemas.wire import Answer, RequestBody
from core.domain import bounds
from core.domain.datasets.statistics import TokenReport


class CreatePreview(RequestBody):
    """Which rows to show, and as which base model sees them."""

    model: str = Field(max_length=200)
    """The base model whose tokenizer and chat template are used."""
    from_line: int = Field(default=1, ge=1, le=10_000_000)
    """The first line to show. The file's first line is 1."""
    rows: int = Field(default=5, ge=1, le=50)
    """The number of rows to show. The statistics count more rows than that."""
    max_seq_len: Annotated[int, bounds.SEQ_LEN.field] | None = None
    """The number of tokens to which longer rows are cut. Null or absent for the base model's greatest."""


class PreviewRow(Answer):
    """One row as the base model sees it, within `max_seq_len`."""

    line: int
    """The row's line in the file."""
    token_ids: list[int]
    """The row's tokens."""
    tokens: list[str]
    """The text of each token."""
    loss_mask: list[int]
    """For each token 1 if it is learnt, otherwise 0."""
    num_tokens: int
    """The number of tokens of the whole row, before it is cut."""
    num_left_out_turns: int
    """The answers that are not learnt, because the base's chat template would not ask for them as they stand."""
    is_truncated: bool
    """Whether the row is longer than `max_seq_len`."""


class TokenBucket(Answer):
    """One bar of the histogram of row lengths."""

    max_tokens: int
    """The greatest length of a row of this bucket, in tokens."""
    num_rows: int
    """The number of rows that are no longer than this, and longer than the bucket before."""


class TokenStatistics(Answer):
    """Counts over the rows that were read: all rows of the file, or its first ones from `from_line` on."""

    num_rows: int
    """The rows that were read and could be rendered."""
    num_tokens: int
    """The tokens that one epoch trains on, after rows are cut."""
    num_learnt_tokens: int
    """The tokens among them that are learnt."""
    longest_row_tokens: int
    """The length of the longest row, in tokens."""
    num_truncated: int
    """The rows that are longer than `max_seq_len`."""
    num_nothing_to_learn: int
    """The rows without a learnt token within `max_seq_len`."""
    num_left_out_turns: int
    """The answers that are not learnt, because the base's chat template would not ask for them as they stand."""
    histogram: list[TokenBucket]
    """The lengths of the rows, in buckets of powers of two."""
    num_problems: int
    """The rows that could not be rendered."""
    is_whole_file: bool
    """Whether every row of the file was read."""


class PreviewObject(Answer):
    """Rows as the chosen base model will see them."""

    object: Literal["file.preview"] = "file.preview"
    """The kind of this object."""
    file_id: str
    """The file's id."""
    model: str
    """The base model."""
    max_seq_len: int
    """The number of tokens to which longer rows are cut."""
    data: list[PreviewRow]
    """The rows that were asked for."""
    problems: list[RowProblem]
    """The first 100 rows that could not be rendered, and why."""
    statistics: TokenStatistics
    """Counts over all rows that were read."""

    @classmethod
    def of(cls, report: TokenReport, *, is_whole_file: bool, file_id: str, model: str) -> PreviewObject:
        counted = report.model_dump(include=TokenStatistics.model_fields.keys() - {"is_whole_file"})
        shown = report.model_dump(include={"rows", "problems"})
        return cls(
            file_id=file_id,
            model=model,
            max_seq_len=report.max_seq_len,
            data=shown["rows"],
            problems=shown["problems"],
            statistics=TokenStatistics(**counted, is_whole_file=is_whole_file),
        )
