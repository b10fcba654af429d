"""These tests are about a GPU: without one they refuse to run, so that nobody takes silence for success.

A run that has deselected them may go on.
"""

from __future__ import annotations

import sys

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    sys.path.insert(0, str(config.rootpath))  # bench is no part of the installed package


def pytest_collection_finish(session: pytest.Session) -> None:
    if not torch.cuda.is_available() and any(item.get_closest_marker("gpu") for item in session.items):
        pytest.exit("tests/gpu needs a CUDA device.", returncode=2)
