"""A trainer's loop on a thread, and the object store that it reads from and writes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.trainer.object_store import Store
from tests.integration.trainer.supervision import Supervisor


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as made:
        yield made
        made.is_open.set()
        made.shutdown()


@pytest.fixture
def supervisor(store: Store, tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(store, tmp_path)
    made.start_loop()
    yield made
    made.stop_loop()
