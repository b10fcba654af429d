"""These tests are about a GPU: without one they refuse to run, so that nobody takes silence for success."""

from __future__ import annotations

import pytest
import torch


def pytest_configure() -> None:
    if not torch.cuda.is_available():
        pytest.exit("tests/gpu needs a CUDA device.", returncode=2)
