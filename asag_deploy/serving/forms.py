"""Forms as browsers and `curl -F` send them: the image file in them, and the other fields (RFC 7578).

They are read piece by piece, within the limits of any body.  python-multipart is imported for the first.
"""

from __future__ import annotations

import logging
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from asag_deploy.serving.limits import FRAME_BYTES, Limits, RefusedError
from asag_deploy.serving.options import PARAMETERS, Deadline
from asag_deploy.serving.requests import check_kind, pieces_of, too_large
from asag_deploy.serving.texts import shown

if TYPE_CHECKING:
    from starlette.requests import Request

IMAGE_FIELD = "image"
"""The field that holds the image, if a form has several files."""
_MOST_PARTS = 32
_LONGEST_VALUE = 1024


class Form(NamedTuple):
    """What a form holds."""

    image: bytes
    fields: list[tuple[str, str]]
    """The names and values of all fields that are no files, in their order."""


@dataclass
class _Part:
    name: str | None = None
    is_file: bool = False
    data: bytearray = field(default_factory=bytearray)


async def form_of(request: Request, limits: Limits, deadline: Deadline) -> Form:
    """Read the form that a body is.

    The image is the field `image`, or the only file.  Raises RefusedError for a form without one or that
    cannot be read, for a compressed body, and for more bytes or seconds than the limits allow; ClientGone
    if the client goes away.
    """
    check_kind(request)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # warnings are of what clients do
    from python_multipart import multipart
    from python_multipart.exceptions import FormParserError

    _, options = multipart.parse_options_header(request.headers["content-type"])
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise _bad("the form does not say what stands between its parts (boundary)")
    parts = _Parts(limits)
    try:
        parser = multipart.MultipartParser(boundary, parts.callbacks)
        pieces = pieces_of(request, limits, deadline, most=limits.max_bytes + FRAME_BYTES)
        async with aclosing(pieces):
            async for piece in pieces:
                parser.write(piece)
    except FormParserError:
        raise _bad("the form cannot be read; send it as multipart/form-data, as `curl -F` does") from None
    if not parts.ended:
        raise _bad("the form breaks off before its end; send it again")
    return _form(parts.done)


class _Parts:
    """Collects the parts that a parser finds, as it calls back."""

    def __init__(self, limits: Limits) -> None:
        self.done: list[_Part] = []
        self.ended = False
        self._limits = limits
        self._part = _Part()
        self._header, self._value = bytearray(), bytearray()

    @property
    def callbacks(self) -> Any:
        """What the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_part_end": lambda: self.done.append(self._part),
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.done) == _MOST_PARTS:
            raise _bad(f"the form has more than {_MOST_PARTS} fields")
        self._part = _Part()

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        part.data += data[start:end]
        if not _may_be_image(part):
            if len(part.data) > _LONGEST_VALUE:
                raise _bad(
                    f"the form's field '{shown(part.name or '')}' is longer than {_LONGEST_VALUE} bytes"
                )
        elif len(part.data) > self._limits.max_bytes:
            raise too_large(self._limits)

    def _end_header(self) -> None:
        from python_multipart.multipart import parse_options_header

        header, value = bytes(self._header).strip().lower(), bytes(self._value)
        self._header, self._value = bytearray(), bytearray()
        if header == b"content-disposition":
            _, options = parse_options_header(value)
            if b"name" in options:
                self._part.name = options[b"name"].decode(errors="replace")
            self._part.is_file = b"filename" in options or b"filename*" in options

    def _end(self) -> None:
        self.ended = True


def _may_be_image(part: _Part) -> bool:
    return part.is_file or part.name == IMAGE_FIELD


def _form(parts: list[_Part]) -> Form:
    files = [part for part in parts if _may_be_image(part)]
    # A browser sends the fields that nobody has filled in as well.
    fields = [
        (part.name or "", part.data.decode(errors="replace"))
        for part in parts
        if part.data and not _may_be_image(part)
    ]
    for part in files:
        if part.name in {parameter.name for parameter in PARAMETERS}:
            raise _bad(f"the form's field '{part.name}' is a file; send its value as text")
    named = [part for part in files if part.name == IMAGE_FIELD]
    chosen = named or files
    if not chosen:
        raise RefusedError(
            HTTPStatus.BAD_REQUEST,
            f"the form holds no file; send the image as its field '{IMAGE_FIELD}'",
            reason="no_image",
        )
    if len(chosen) > 1:
        raise _bad(
            f"the form holds {len(chosen)} files{' of that name' if named else ''}; send one image, as its "
            f"field '{IMAGE_FIELD}'"
        )
    if not chosen[0].data:
        raise RefusedError(
            HTTPStatus.BAD_REQUEST, "the form's file is empty; choose an image file", reason="no_image"
        )
    return Form(bytes(chosen[0].data), fields)


def _bad(sentence: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, sentence, reason="bad_form")
