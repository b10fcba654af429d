"""Pages of objects, and the answer to a deletion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

from pydantic import ConfigDict

from api.schemas.wire import Answer
from core.domain.values import Page

T = TypeVar("T")
R = TypeVar("R")


class ListObject(Answer, Generic[T]):
    """One page of a list."""

    # A parametrized class does not inherit its docstring.
    model_config = ConfigDict(json_schema_extra={"description": "One page of a list."})

    object: Literal["list"] = "list"
    """The kind of this object."""
    data: list[T]
    """The objects of this page."""
    has_more: bool = False
    """Whether more objects follow. Send `last_id` as `after` to get the next page."""
    first_id: str | None = None
    """The id of the page's first object. Null if the page is empty or the list has no pages."""
    last_id: str | None = None
    """The id of the page's last object, which is the cursor of the next page. Null if `first_id` is."""


class DeletedObject(Answer):
    """An object was deleted."""

    id: str
    """The id of the deleted object."""
    object: Literal["file", "fine_tuning.job", "model", "checkpoint.permission", "organization.api_key"]
    """The kind of the deleted object.

    - `file`: A file.
    - `fine_tuning.job`: A job.
    - `model`: A fine-tuned model.
    - `checkpoint.permission`: A permission to read a checkpoint.
    - `organization.api_key`: An API key, which is revoked.
    """
    deleted: Literal[True] = True
    """Always true: a deletion that fails answers an error."""


def as_list(page: Page[R], convert: Callable[[R], Any]) -> ListObject[Any]:
    """Return a page as OpenAI's list object. The client's next cursor is the last item's id."""
    data = [convert(row) for row in page.items]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return ListObject(data=data, has_more=page.has_more, first_id=first_id, last_id=last_id)
