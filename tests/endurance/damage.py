"""How valid files are damaged: hypothesis strategies that take seeds and give what may arrive in their place.

Every strategy draws a seed and a few edits of it, so that hypothesis shrinks what fails to the fewest and
simplest edits.  Those for JSON, protocol buffers, PNG, JPEG and pickles know the format, so that most of what
they give gets past the first check of whoever reads it.
"""

from __future__ import annotations

import copy
import json
import pickletools
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

Edit = Callable[[DrawFn, bytes], bytes]

_NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**64 - 1,
)
"""Integers at which lengths, offsets and counts go wrong."""

EXTREMES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, -(2**31), 2**63, -(2**63), 2**64, 10**400),
    *(0.5, -0.0, 1e-300, 1e38, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "0",
        "1",
        "nan",
        "x",
        "\0",
        "two\nlines",
        "\ud800",
        "\u202e",
        "\x1b[2J",
        "x" * 3000,
        "../../x",
        "/",
        ".",
    ),
    *([], {}, [[]], [0], [1, 2, 3, 4], {"a": 1}, [None], [{}], [1e308] * 4, [-1, -1, 0, 0]),
)
"""Values that are put in place of others in JSON."""

_TOKENS = (
    b"",
    b"\0",
    b"\n",
    b"\r\n",
    b"\xff",
    b"\xef\xbb\xbf",
    b"9" * 5000,
    b"[" * 5000,
    b'{"a":' * 5000,
    b"1e999",
)


def damaged_bytes(seeds: Sequence[bytes], tokens: Sequence[bytes] = ()) -> SearchStrategy[bytes]:
    """Give seeds with a few bytes changed, moved, doubled, cut out or put in; `tokens` of the format too."""
    known = (*_TOKENS, *tokens)

    @st.composite
    def damaged(draw: DrawFn) -> bytes:
        data: bytes = draw(st.sampled_from(seeds))
        for _ in range(draw(st.integers(0, 5))):
            data = _edit_bytes(draw, data, seeds, known)
        return data

    return damaged()


def _edit_bytes(draw: DrawFn, data: bytes, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    start = draw(st.integers(0, len(data)))
    kind = draw(
        st.sampled_from(("bit", "byte", "number", "cut", "end", "twice", "token", "random", "splice", "zero"))
    )
    if kind == "bit" and start < len(data):
        return data[:start] + bytes([data[start] ^ 1 << draw(st.integers(0, 7))]) + data[start + 1 :]
    if kind == "byte":
        return data[:start] + bytes([draw(st.integers(0, 255))]) + data[start + 1 :]
    if kind == "number":
        size = draw(st.sampled_from((1, 2, 4, 8)))
        value: int = draw(st.sampled_from(_NUMBERS)) % 256**size
        number = value.to_bytes(size, "little" if draw(st.integers(0, 1)) == 1 else "big")
        return data[:start] + number + data[start + size :]
    if kind == "end":
        return data[:start]
    if kind == "token":
        return data[:start] + draw(st.sampled_from(tokens)) + data[start:]
    if kind == "random":
        return data[:start] + draw(st.binary(max_size=16)) + data[start:]
    if kind == "splice":
        other = draw(st.sampled_from(seeds))
        return data[:start] + other[draw(st.integers(0, len(other))) :]
    length = draw(st.integers(0, 64)) * draw(st.sampled_from((1, 1, 64)))
    part = data[start : start + length]
    if kind == "twice":
        return data[:start] + part + data[start:]
    return data[:start] + (bytes(len(part)) if kind == "zero" else b"") + data[start + length :]


def damaged_json(
    seeds: Sequence[Any], *, values: Sequence[Any] = (), lines: bool = False
) -> SearchStrategy[bytes]:
    """Give the text of JSON seeds whose values were replaced, moved, doubled, renamed or left out.

    One in a few is damaged as text too.  values: more to put in place of others.  lines: a seed is a list,
    and each of its items a line of the file.
    """

    @st.composite
    def damaged(draw: DrawFn) -> bytes:
        value = draw(changed(seeds, values))
        if lines:
            items = value if isinstance(value, list) else [value]
            text = b"\n".join(json.dumps(item).encode() for item in items)
        else:
            text = json.dumps(value).encode()
        if draw(st.integers(0, 9)) == 9:
            text = draw(damaged_bytes([text], [b"NaN", b'"', b"}", b"]", b",", b"\\ud800"]))
        return text

    return damaged()


@st.composite
def changed(draw: DrawFn, seeds: Sequence[Any], values: Sequence[Any] = ()) -> Any:
    """Give JSON seeds, as values, in which up to three things were changed."""
    value = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(value))
        if places:
            _edit_value(draw, places, values)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """List every container with each key or index in it."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        inner = stack.pop()
        if isinstance(inner, dict | list):
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            found += [(inner, key) for key in keys]
            stack += [inner[key] for key in keys]
    return found


def _edit_value(draw: DrawFn, places: list[tuple[Any, Any]], values: Sequence[Any]) -> None:
    container, key = places[draw(st.integers(0, len(places) - 1))]
    kind = draw(
        st.sampled_from(("replace", "replace", "near", "near", "delete", "twice", "move", "rename", "wrap"))
    )
    own = container[key]
    if kind == "near" and type(own) in (int, float):
        near = [-own, own + 1, own - 1, own * 2, own * 10**6, str(own)]
        near += [float(own)] if abs(own) < 2**1000 else []
        container[key] = draw(st.sampled_from(near))
    elif kind in ("replace", "near"):
        container[key] = copy.deepcopy(draw(st.sampled_from((*EXTREMES, *values))))
    elif kind == "delete":
        del container[key]
    elif kind == "move":
        other, name = places[draw(st.integers(0, len(places) - 1))]
        container[key] = copy.deepcopy(other[name])
    elif kind == "wrap":
        container[key] = draw(st.sampled_from(([own], {"a": own}, str(own), [own] * 3)))
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(own))
    else:
        container[draw(st.sampled_from(("", "x", key + "x", key.upper(), "two\nlines", "\ud800")))] = own
        if kind == "rename":
            del container[key]


def damaged_messages(seeds: Sequence[Any]) -> SearchStrategy[bytes]:
    """Give protocol buffers, damaged in what they say; those that cannot be written so, as bytes."""
    from google.protobuf.json_format import MessageToDict, ParseDict, ParseError  # type: ignore[import-untyped]

    kind = type(seeds[0])
    written = [seed.SerializeToString() for seed in seeds]
    plain = [MessageToDict(seed) for seed in seeds]
    raw = damaged_bytes(written)

    @st.composite
    def damaged(draw: DrawFn) -> bytes:
        if draw(st.integers(0, 3)) == 3:
            return draw(raw)
        try:
            message = ParseDict(draw(changed(plain)), kind(), ignore_unknown_fields=True)
            return bytes(message.SerializeToString())
        except (
            ParseError,
            ArithmeticError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
            SystemError,
        ):
            return draw(raw)

    return damaged()


def damaged_pickles(seeds: Sequence[bytes]) -> SearchStrategy[bytes]:
    """Give pickles whose instructions were left out, doubled, swapped or mixed with those of other seeds."""
    cut = [_instructions(seed) for seed in seeds]
    pool = sorted({part for parts in cut for part in parts})

    @st.composite
    def damaged(draw: DrawFn) -> bytes:
        parts = list(draw(st.sampled_from(cut)))
        for _ in range(draw(st.integers(0, 4))):
            at, other = (draw(st.integers(0, max(len(parts) - 1, 0))) for _ in range(2))
            kind = draw(st.sampled_from(("delete", "insert", "swap", "replace", "bytes")))
            if kind == "insert" or not parts:
                parts.insert(at, draw(st.sampled_from(pool)))
            elif kind == "delete":
                del parts[at]
            elif kind == "swap":
                parts[at], parts[other] = parts[other], parts[at]
            elif kind == "replace":
                parts[at] = draw(st.sampled_from(pool))
            else:
                parts[at] = draw(damaged_bytes([parts[at]]))
        return b"".join(parts)

    return damaged()


def _instructions(pickled: bytes) -> list[bytes]:
    starts = [position for _, _, position in pickletools.genops(pickled) if position is not None]
    return [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]


def damaged_png(seeds: Sequence[bytes], chunks: Sequence[tuple[bytes, bytes]]) -> SearchStrategy[bytes]:
    """Give PNGs whose chunks were changed, with the right checksum.  chunks: more, as kind and content."""
    return _damaged_parts([_png_chunks(seed) for seed in seeds], chunks, _write_png)


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, position = [], 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        found.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


def _write_png(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def damaged_jpeg(seeds: Sequence[bytes], segments: Sequence[tuple[bytes, bytes]]) -> SearchStrategy[bytes]:
    """Give JPEGs whose segments were changed, with the right lengths.

    segments: more, as marker and content.
    """
    return _damaged_parts([_jpeg_segments(seed) for seed in seeds], segments, _write_jpeg)


_SCAN = b"\xff\xda"


def _jpeg_segments(data: bytes) -> list[tuple[bytes, bytes]]:
    """Cut into segments; the last is the scan, with all that follows it."""
    found: list[tuple[bytes, bytes]] = []
    position = 2
    while True:
        marker = data[position : position + 2]
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == _SCAN:
            return [*found, (marker, data[position + 4 :])]
        found.append((marker, data[position + 4 : position + 2 + length]))
        position += 2 + length


def _write_jpeg(segments: Sequence[tuple[bytes, bytes]]) -> bytes:
    out = b"\xff\xd8"
    for marker, body in segments:
        # The scan is as long as its header says of its components, and its data goes on behind it.
        length = 2 + (1 + 2 * body[0] + 3 if marker == _SCAN and body else len(body))
        out += marker + struct.pack(">H", min(length, 0xFFFF)) + body
    return out


def _damaged_parts(
    seeds: Sequence[Sequence[tuple[bytes, bytes]]],
    more: Sequence[tuple[bytes, bytes]],
    write: Callable[[Sequence[tuple[bytes, bytes]]], bytes],
) -> SearchStrategy[bytes]:
    """Give files of parts, each a kind and a content, of which a few were changed, doubled or left out."""
    pool = [*more, *(part for seed in seeds for part in seed)]

    @st.composite
    def damaged(draw: DrawFn) -> bytes:
        parts = list(draw(st.sampled_from(seeds)))
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, max(len(parts) - 1, 0)))
            edit = draw(st.sampled_from(("content", "content", "insert", "delete", "swap", "kind")))
            if edit == "insert" or not parts:
                parts.insert(at, draw(st.sampled_from(pool)))
            elif edit == "delete":
                del parts[at]
            elif edit == "swap":
                other = draw(st.integers(0, len(parts) - 1))
                parts[at], parts[other] = parts[other], parts[at]
            elif edit == "kind":
                parts[at] = (draw(st.sampled_from(pool))[0], parts[at][1])
            else:
                parts[at] = (parts[at][0], draw(damaged_bytes([parts[at][1]])))
        data = write(parts)
        return draw(damaged_bytes([data])) if draw(st.integers(0, 9)) == 9 else data

    return damaged()
