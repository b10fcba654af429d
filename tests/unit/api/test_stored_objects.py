"""An object that a row stores as JSON is shown unchanged. A value that is no object is refused."""

from __future__ import annotations

import datetime as dt
import json
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from api.schemas.openai.events import EventObject
from core.domain.ids import new_id


def show(details: Any) -> EventObject:
    row = SimpleNamespace(
        id=new_id(), created_at=dt.datetime.now(dt.UTC), level="info", message="m", type="metrics", details=details
    )
    return EventObject.of(row)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "stored", ['{"step":1}', '{"train_loss":2,"step":1,"of_another_release":[1,null]}', "{}", "null"]
)
def test_keys_order_and_numbers_stay_as_they_were_stored(stored: str) -> None:
    assert show(json.loads(stored)).model_dump_json().endswith(f'"data":{stored}}}')


@pytest.mark.parametrize("stored", [[1], "text", 1])
def test_what_is_no_object_is_refused(stored: Any) -> None:
    with pytest.raises(ValidationError):
        show(stored)
