"""Tests of a GPU. Without one they fail instead of being skipped, so that nobody takes a skip for a success.

A run that has deselected them goes on.
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
