"""A multipart body as a stream: the file's bytes pass through one chunk at a time, the small fields are kept.

A refused body is read to its end and forgotten, so that the client reads the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from core.domain.errors import InvalidRequestError, PayloadTooLargeError

_MAX_FIELD_BYTES = 4096
_MAX_FIELDS = 32


def describe_multipart(fields: dict[str, Any], *, required: list[str]) -> dict[str, Any]:
    """Return the OpenAPI of a multipart body that a route reads as a stream, which FastAPI does not see."""
    schema = {"type": "object", "properties": fields, "required": required}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@dataclass
class MultipartForm:
    """One multipart body. `fields` and `filename` are complete once `iterate_file` is exhausted."""

    content_type: str
    body: Iterator[bytes]
    max_file_bytes: int
    file_field: str = "file"
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None

    def iterate_file(self) -> Iterator[bytes]:
        """Yield the file's bytes. Raises InvalidRequestError for a body that is no such form, or too large."""
        try:
            yield from self._parse()
        except MultipartParseError as error:
            raise InvalidRequestError(f"The multipart body is malformed: {error}") from error
        if self.filename is None:
            raise InvalidRequestError(
                f"The form has no file. Send it as the field `{self.file_field}`.", param=self.file_field
            )

    def drain(self) -> None:
        """Read the rest of the body without keeping it, up to twice the largest allowed file."""
        left = 2 * self.max_file_bytes
        with suppress(RuntimeError):  # the client has gone
            for chunk in self.body:
                left -= len(chunk)
                if left < 0:
                    return

    def _parse(self) -> Iterator[bytes]:
        kind, options = parse_options_header(self.content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise InvalidRequestError("Send the file as multipart/form-data.", param=self.file_field)
        collector = _PartCollector(self.file_field.encode())
        parser = MultipartParser(options[b"boundary"], collector.callbacks)
        num_bytes = 0
        for chunk in self.body:
            parser.write(chunk)
            while collector.file_chunks:
                part = collector.file_chunks.popleft()
                num_bytes += len(part)
                if num_bytes > self.max_file_bytes:
                    raise PayloadTooLargeError(
                        f"The file is larger than {self.max_file_bytes} bytes. Split it.", param=self.file_field
                    )
                yield part
        parser.finalize()
        self.fields, self.filename = collector.fields, collector.filename


class _PartCollector:
    """The callbacks of the push parser. They sort parts into the file's chunks and the fields."""

    def __init__(self, file_field: bytes) -> None:
        self._file_field = file_field
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.file_chunks: deque[bytes] = deque()
        self._name = b""
        self._value = bytearray()
        self._header_name = b""
        self._header_value = b""

    @property
    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._extend_header_name,
            "on_header_value": self._extend_header_value,
            "on_header_end": self._end_header,
            "on_part_data": self._take,
            "on_part_end": self._end_part,
        }

    def _begin_part(self) -> None:
        self._name = b""
        self._value.clear()

    def _extend_header_name(self, chunk: bytes, start: int, end: int) -> None:
        self._header_name += chunk[start:end]

    def _extend_header_value(self, chunk: bytes, start: int, end: int) -> None:
        self._header_value += chunk[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(self._header_value)
            self._name = options.get(b"name", b"")
            if self._name == self._file_field:
                self.filename = display_name(options.get(b"filename", b""))
        self._header_name = self._header_value = b""

    def _take(self, chunk: bytes, start: int, end: int) -> None:
        if self._name == self._file_field:
            self.file_chunks.append(chunk[start:end])
            return
        self._value += chunk[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise PayloadTooLargeError("A form field is too long.", param=self._name.decode(errors="replace")[:50])

    def _end_part(self) -> None:
        if self._name != self._file_field:
            if len(self.fields) >= _MAX_FIELDS:
                raise PayloadTooLargeError(f"The form has more than {_MAX_FIELDS} fields.")
            name = self._name.decode(errors="replace")
            self.fields[name] = self._value.decode(errors="replace")


def display_name(raw: bytes) -> str:
    """Return a file name that is safe to show. It never becomes part of a path or an object key."""
    name = raw.decode(errors="replace").replace("\\", "/").rpartition("/")[2]
    shown = "".join(character for character in name if character.isprintable())
    return shown[:255] or "upload.jsonl"
