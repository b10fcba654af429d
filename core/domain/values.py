"""Values that several packages use: frozen models, a page of a list, and stored artifacts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


class Frozen(BaseModel):
    """An immutable value. Unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list by keyset pagination. The cursor is the last item's own id."""

    items: tuple[T, ...]
    has_more: bool

    @classmethod
    def cut(cls, rows: Sequence[T], limit: int) -> Page[T]:
        """Make a page of `limit` from `limit` + 1 rows; the extra row only shows whether there are more."""
        return cls(items=tuple(rows[:limit]), has_more=len(rows) > limit)


class StoredFile(Frozen):
    """An object of an artifact, by its name below the artifact's prefix."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredArtifact:
    """Files below one object prefix, verified by reading them back."""

    object_prefix: str
    files: tuple[StoredFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @classmethod
    def of_row(cls, object_prefix: str, files: Iterable[Mapping[str, Any]]) -> StoredArtifact:
        """Read an artifact back from what `dump_files` has made. Raises pydantic.ValidationError if it has not."""
        return cls(object_prefix, tuple(map(StoredFile.model_validate, files)))

    def dump_files(self) -> list[dict[str, Any]]:
        """Return the files in the form that rows store."""
        return [file.model_dump() for file in self.files]
