"""What all objects of the wire share: the string below a field is its description in the OpenAPI document."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema


class Answer(BaseModel):
    """An object that the service sends."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class RequestBody(BaseModel):
    """An object that the service receives. Fields that it does not declare are refused."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", allow_inf_nan=False)


STORED = ConfigDict(use_attribute_docstrings=True, extra="allow")


@dataclass(frozen=True)
class AsStored:
    """Annotates a TypedDict that a row holds as JSON: it must be an object, and is shown as it was stored.

    The TypedDict names and describes the keys. Their values are not validated, so that a row from an older release is
    still shown.
    """

    def __get_pydantic_core_schema__(self, source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        described = TypeAdapter(source).json_schema()
        metadata = {"pydantic_js_functions": [lambda _schema, _describe: described]}
        return core_schema.dict_schema(core_schema.str_schema(), metadata=metadata)


def unix_seconds(instant: dt.datetime) -> int:
    return int(instant.timestamp())


def optional_seconds(instant: dt.datetime | None) -> int | None:
    return None if instant is None else unix_seconds(instant)
