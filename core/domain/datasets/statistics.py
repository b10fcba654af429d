"""Rows as a base tokenises them, with the loss mask, and the token counts of a whole dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pydantic import ConfigDict

from core.domain.datasets.rows import parse_example
from core.domain.datasets.tokenizers import BaseTokenizer, RenderingError
from core.domain.datasets.tokens import ConversationTokenizer, TokenizedConversation
from core.domain.datasets.values import Problem, ProblemError
from core.domain.values import Frozen

MAX_PROBLEMS = 100
TEMPLATE_REFUSED = "template_refused"
_SMALLEST_BUCKET = 16


class NumberedLine(Frozen):
    """One line of a file, without its line feed; 1 is the first."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    number: int
    content: bytes


class PreviewRow(Frozen):
    """One row within `max_seq_len`. `loss_mask[i]` is 1 where token i is learnt.

    `num_left_out_turns` counts the answers of weight 1 that are not learnt, because a server would not send the base
    the same context.
    """

    line: int
    token_ids: list[int]
    tokens: list[str]
    loss_mask: list[int]
    num_tokens: int
    num_left_out_turns: int
    is_truncated: bool


class RowProblem(Frozen):
    line: int
    path: str
    code: str
    message: str
    hint: str


class TokenBucket(Frozen):
    """How many rows have at most `max_tokens` tokens, and more than the bucket before."""

    max_tokens: int
    num_rows: int


class TokenReport(Frozen):
    """`num_truncated` rows are longer than `max_seq_len`; `num_nothing_to_learn` have no learnt token within it.

    `num_left_out_turns` counts the answers of weight 1 that are not learnt, because a server would not send the base
    the same context.
    `num_tokens` and `num_learnt_tokens` count what is trained on in one epoch.
    """

    max_seq_len: int
    num_rows: int
    num_tokens: int
    num_learnt_tokens: int
    longest_row_tokens: int
    num_truncated: int
    num_nothing_to_learn: int
    num_left_out_turns: int
    histogram: list[TokenBucket]
    rows: list[PreviewRow]
    problems: list[RowProblem]
    num_problems: int

    @classmethod
    def joined(cls, reports: Iterable[TokenReport]) -> TokenReport:
        """Return the sum of the reports on the parts of one file."""
        parts = list(reports)
        counts = Counter[int]()
        for part in parts:
            counts.update({bucket.max_tokens: bucket.num_rows for bucket in part.histogram})
        return cls(
            max_seq_len=parts[0].max_seq_len,
            num_rows=sum(part.num_rows for part in parts),
            num_tokens=sum(part.num_tokens for part in parts),
            num_learnt_tokens=sum(part.num_learnt_tokens for part in parts),
            longest_row_tokens=max(part.longest_row_tokens for part in parts),
            num_truncated=sum(part.num_truncated for part in parts),
            num_nothing_to_learn=sum(part.num_nothing_to_learn for part in parts),
            num_left_out_turns=sum(part.num_left_out_turns for part in parts),
            histogram=_as_buckets(counts),
            rows=[row for part in parts for row in part.rows],
            problems=[problem for part in parts for problem in part.problems][:MAX_PROBLEMS],
            num_problems=sum(part.num_problems for part in parts),
        )


def report_tokens(
    tokenizer: BaseTokenizer, lines: Iterable[NumberedLine], *, max_seq_len: int, num_shown: int
) -> TokenReport:
    """Tokenise every line as the trainer does. Show the first `num_shown` and count all."""
    conversations = ConversationTokenizer(tokenizer)
    lengths: list[int] = []
    counts: Counter[str] = Counter()
    rows: list[PreviewRow] = []
    problems: list[RowProblem] = []
    for line in lines:
        try:
            whole = conversations.tokenize(parse_example(line.content, line_number=line.number))
        except (ProblemError, RenderingError) as error:
            problems.append(_as_problem(line, error))
            continue
        cut = whole.cut(max_seq_len)
        lengths.append(whole.num_tokens)
        counts.update(
            tokens=cut.num_tokens,
            learnt=cut.num_labels,
            dropped=not cut.num_labels,
            left_out=whole.num_left_out_turns,
        )
        if len(rows) < num_shown:
            rows.append(_show_row(tokenizer, cut, line=line.number, num_tokens=whole.num_tokens))
    return TokenReport(
        max_seq_len=max_seq_len,
        num_rows=len(lengths),
        num_tokens=counts["tokens"],
        num_learnt_tokens=counts["learnt"],
        longest_row_tokens=max(lengths, default=0),
        num_truncated=sum(length > max_seq_len for length in lengths),
        num_nothing_to_learn=counts["dropped"],
        num_left_out_turns=counts["left_out"],
        histogram=_as_buckets(Counter(_bucket_of(length) for length in lengths)),
        rows=rows,
        problems=problems[:MAX_PROBLEMS],
        num_problems=len(problems),
    )


def _show_row(tokenizer: BaseTokenizer, cut: TokenizedConversation, *, line: int, num_tokens: int) -> PreviewRow:
    return PreviewRow(
        line=line,
        token_ids=cut.token_ids,
        tokens=[tokenizer.show_token(token_id) for token_id in cut.token_ids],
        loss_mask=[int(is_label) for is_label in cut.is_label],
        num_tokens=num_tokens,
        num_left_out_turns=cut.num_left_out_turns,
        is_truncated=num_tokens > cut.num_tokens,
    )


def _bucket_of(num_tokens: int) -> int:
    """Return the least power of two, from 16 on, that is at least this many tokens."""
    return max(_SMALLEST_BUCKET, 1 << (num_tokens - 1).bit_length())


def _as_buckets(counts: Counter[int]) -> list[TokenBucket]:
    return [TokenBucket(max_tokens=size, num_rows=counts[size]) for size in sorted(counts)]


def _as_problem(line: NumberedLine, error: ProblemError | RenderingError) -> RowProblem:
    if isinstance(error, RenderingError):
        hint = "Change the row, or choose another base model."
        problem = Problem(line.number, "", TEMPLATE_REFUSED, str(error)[:500], hint)
    else:
        problem = error.problem
    return RowProblem(
        line=problem.line, path=problem.path, code=problem.code, message=problem.message, hint=problem.hint
    )
