"""What all objects of the wire share: the string below a field is its description in the OpenAPI document."""

from __future__ import annotations

import datetime as dt

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """An object that the service sends."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class RequestBody(BaseModel):
    """An object that the service receives. Fields that it does not declare are refused."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", allow_inf_nan=False)


# A row holds some objects as JSON. They are shown as they were stored: a TypedDict names and describes their keys, and
# validates nothing, so that a row from an older release is still shown.
STORED = ConfigDict(use_attribute_docstrings=True, extra="allow")


def unix_seconds(instant: dt.datetime) -> int:
    return int(instant.timestamp())


def optional_seconds(instant: dt.datetime | None) -> int | None:
    return None if instant is None else unix_seconds(instant)
