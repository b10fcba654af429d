"""On a bf16 base, training beside others costs a job no more precision than padding costs it alone."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.unit.engine.company import check_company_costs_no_more_than_padding


def test_company_costs_a_job_on_a_bf16_base_no_more_than_padding_does(tmp_path: Path) -> None:
    check_company_costs_no_more_than_padding(tmp_path, torch.device("cpu"))
