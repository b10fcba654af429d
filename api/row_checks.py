"""Renders the first rows of a dataset with the base's chat template before a job on them is accepted.

Rows that the template refuses would otherwise fail the job after it has queued. A check costs a process and about half
a second of a processor. Datasets that passed are remembered by their content. So many jobs over the same rows cost one
check, even if each has uploaded them again.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

import structlog
from anyio import CapacityLimiter

from api.previews import Previewer, PreviewOrder
from core.domain.dataset_counts import FILE_FIELDS, explain_nothing_to_learn, place_in_file
from core.domain.datasets.statistics import TEMPLATE_REFUSED, TokenReport
from core.domain.errors import InvalidRequestError
from core.services.submissions import DatasetRows
from core.storage import StorageError

log = structlog.get_logger()
_MAX_ROWS = 200
_MAX_BYTES = 2**18
_MAX_KNOWN = 4096
_PLACES = 2  # child processes of up to 1 GiB each, beside those of previews


class RowChecker:
    """Checks the first rows of a dataset, and remembers the datasets that passed."""

    def __init__(self, previewer: Previewer) -> None:
        self.limiter = CapacityLimiter(_PLACES)
        self._previewer = previewer
        self._known: OrderedDict[tuple[object, ...], None] = OrderedDict()
        self._lock = Lock()

    def knows(self, rows: DatasetRows) -> bool:
        return _identify(rows) in self._known

    def check(self, rows: DatasetRows) -> None:
        """Raise InvalidRequestError for rows that no attempt could train on.

        If the rows cannot be rendered here, because the store is away or a limit is passed, the worker finds out.
        """
        order = PreviewOrder(rows.object_key, rows.tokenizer_key, 1, 0, rows.max_seq_len)
        try:
            made = self._previewer.preview(order, max_rows=_MAX_ROWS, max_bytes=_MAX_BYTES)
        except (StorageError, InvalidRequestError) as error:
            log.warning("rows.unchecked", file=rows.file, error=type(error).__name__)
        else:
            _refuse(made.report, rows, is_whole_file=made.is_whole_file)
        with self._lock:
            self._known[_identify(rows)] = None
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)


def _identify(rows: DatasetRows) -> tuple[object, ...]:
    """Return what makes two checks the same. The tenant is part of it, so no tenant learns what others have."""
    return rows.tenant_id, rows.sha256, rows.tokenizer_key, rows.max_seq_len


def _refuse(report: TokenReport, rows: DatasetRows, *, is_whole_file: bool) -> None:
    """Raise InvalidRequestError for rows that the base's template refuses.

    The rows themselves were checked at their upload. A row that is malformed now was damaged on its way, and passes,
    because the worker fetches it again.
    """
    param = FILE_FIELDS[rows.file]
    for found in report.problems:
        if found.code == TEMPLATE_REFUSED:
            told = f"{place_in_file(rows.file, found.line, found.path)}: {found.message} {found.hint}"
            raise InvalidRequestError(told, code=found.code, param=param)
    if is_whole_file and not report.problems and report.num_nothing_to_learn == report.num_rows:
        why = explain_nothing_to_learn(max_seq_len=report.max_seq_len, num_left_out_turns=report.num_left_out_turns)
        told = f"No row of the {rows.file} file has anything to learn. {why}"
        raise InvalidRequestError(told, code="nothing_to_learn", param=param)
