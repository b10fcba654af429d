"""Tests of a GPU. Without one they fail instead of being skipped, so that nobody takes a skip for a success."""

from __future__ import annotations

import sys

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    if not torch.cuda.is_available():
        pytest.exit("tests/gpu needs a CUDA device.", returncode=2)
    sys.path.insert(0, str(config.rootpath))  # bench is no part of the installed package
