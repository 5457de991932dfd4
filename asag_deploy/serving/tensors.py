"""Inference requests and responses of the Open Inference Protocol, as bytes.

https://github.com/kserve/open-inference-protocol, version 2 over REST, with its extension for binary tensor
data: after the JSON stand the tensors of those that say how many bytes they have, in order; of BYTES each
element begins with its length, 4 bytes, little-endian.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_deploy.errors import FieldError, plural
from asag_deploy.plain_numbers import unsigned
from asag_deploy.serving.limits import RefusedError
from asag_deploy.serving.texts import shown
from asag_deploy.typed_json import parse_json

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The header that says how many bytes the JSON has, where binary data follows."""
INPUT = "image"
MOST_IMAGES = 64
"""Of one request."""
_LENGTH = struct.Struct("<I")
_OF_PROTOCOL = ("binary_data_output",)
"""Parameters of a request that say how it is answered."""


class OutputSpec(NamedTuple):
    """A tensor that a response can have."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """-1 where it depends on the images."""
    text: str


OUTPUTS = (
    OutputSpec(
        "boxes", "FP32", (-1, 4), "x1, y1, x2, y2 in pixels of the image, of all images one after another"
    ),
    OutputSpec("scores", "FP32", (-1,), "confidence, from 0 to 1, best first within each image"),
    OutputSpec("labels", "INT64", (-1,), "index of the class"),
    OutputSpec("counts", "INT64", (-1,), "how many detections each image has"),
    OutputSpec("trace", "BYTES", (-1,), "JSON of each image: the levels that were probed, and why it ended"),
)
"""All there are."""
_OUTPUT_NAMES = tuple(spec.name for spec in OUTPUTS)
_DATATYPES = {np.dtype(np.float32): "FP32", np.dtype(np.int64): "INT64"}


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """An inference request that has been read."""

    id: str | None
    images: tuple[bytes, ...]
    """Image files."""
    options: tuple[tuple[str, Any], ...]
    """Names and values of its other parameters."""
    outputs: tuple[tuple[str, bool], ...]
    """The tensors it asks for, and whether each as binary data."""


def read_request(data: bytes, header_length: str | None) -> InferRequest:
    """Read a request; `header_length` is its header of that name, if it has one.

    Raises RefusedError, with one sentence, for what is no such request.
    """
    head, binary = _split(data, header_length)
    try:
        return _read(parse_json(head), binary)
    except FieldError as error:
        raise _bad(f"in the request, {error}; give it once") from None
    except ValueError:
        raise _bad("the request is no JSON that can be read; see the Open Inference Protocol") from None


def _read(content: object, binary: bytes) -> InferRequest:
    if not isinstance(content, dict):
        raise _bad("the request is not a JSON object; see the Open Inference Protocol")
    name = content.get("id")
    if name is not None and not isinstance(name, str):
        raise _bad("the request's id is no string")
    parameters = _parameters(content, "request")
    inputs = content.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise _bad(f"the request has to have one input, called '{INPUT}'")
    return InferRequest(
        id=name,
        images=tuple(_images(inputs[0], binary)),
        options=tuple((name, value) for name, value in parameters.items() if name not in _OF_PROTOCOL),
        outputs=_outputs(content.get("outputs"), parameters.get("binary_data_output", False)),
    )


def write_response(
    head: Mapping[str, Any], tensors: Mapping[str, Any], outputs: Sequence[tuple[str, bool]]
) -> tuple[bytes, dict[str, str]]:
    """Write a response; return it and its headers.

    head: `model_name` and what else stands beside the outputs; tensors: by the names of `OUTPUTS`, arrays, or
    lists of str for BYTES; outputs: which of them, in which order, and whether each as binary data.
    """
    described, binary = [], []
    for name, as_binary in outputs:
        tensor = tensors[name]
        is_array = isinstance(tensor, np.ndarray)
        one: dict[str, Any] = {
            "name": name,
            "datatype": _DATATYPES[tensor.dtype] if is_array else "BYTES",
            "shape": list(tensor.shape) if is_array else [len(tensor)],
        }
        if as_binary:
            binary.append(_packed(tensor))
            one["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            one["data"] = tensor.reshape(-1).tolist() if is_array else list(tensor)
        described.append(one)
    text = json.dumps({**head, "outputs": described}, separators=(",", ":")).encode()
    if not binary:
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join((text, *binary)), headers


def _split(data: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    if header_length is None:
        return data, b""
    length = unsigned(header_length)
    if length is None or not 0 < length <= len(data):
        raise _bad(
            f"{HEADER_LENGTH} is '{shown(header_length)}', which is not the length of a JSON in the body"
        )
    return data[:length], data[length:]


def _images(given: Mapping[str, Any], binary: bytes) -> list[bytes]:
    name, datatype, shape = (given.get(key) for key in ("name", "datatype", "shape"))
    if name != INPUT:
        raise _bad(f"there is no input '{shown(str(name))}'; the only one is '{INPUT}'")
    if datatype != "BYTES":
        raise _bad(f"the input '{INPUT}' is of type {shown(str(datatype))}; send image files, as BYTES")
    sides = shape if isinstance(shape, list) else []
    whole = all(type(side) is int and side > 0 for side in sides)
    if not whole or not 1 <= len(sides) <= 2 or sides[1:] not in ([], [1]):
        raise _bad(f"the input '{INPUT}' is of shape {shown(json.dumps(shape))}; expected [n] or [n, 1]")
    if sides[0] > MOST_IMAGES:
        raise _bad(f"the input '{INPUT}' holds {sides[0]} images; send {MOST_IMAGES} at most")
    size = _parameters(given, f"input '{INPUT}'").get("binary_data_size")
    images = list(_from_json(given.get("data"), binary) if size is None else _unpacked(binary, size))
    if len(images) != sides[0]:
        raise _bad(f"the input '{INPUT}' holds {plural(len(images), 'image')}, and its shape says {sides[0]}")
    return images


def _from_json(data: object, binary: bytes) -> Iterator[bytes]:
    if binary:
        raise _bad(f"the input '{INPUT}' has binary data, but no parameter binary_data_size")
    if not isinstance(data, list):
        raise _bad(f"the input '{INPUT}' has neither data nor binary_data_size")
    for one in data:
        nested = one[0] if isinstance(one, list) and len(one) == 1 else one  # of shape [n, 1]
        try:
            yield base64.b64decode(nested if isinstance(nested, str) else "?", validate=True)
        except (binascii.Error, ValueError):
            raise _bad(
                f"the input '{INPUT}' has data in JSON that is no base64; send base64, or binary data"
            ) from None


def _unpacked(binary: bytes, size: object) -> Iterator[bytes]:
    if size != len(binary) or isinstance(size, bool):
        follow = plural(len(binary), "byte follows", "bytes follow")
        raise _bad(f"binary_data_size is {shown(repr(size))}, but {follow} the JSON")
    start = 0
    while start < len(binary):
        begin = start + _LENGTH.size
        end = begin + _LENGTH.unpack_from(binary, start)[0] if begin <= len(binary) else begin
        if end > len(binary):
            raise _bad(
                f"the input '{INPUT}' breaks off; each image begins with its length, 4 bytes little-endian"
            )
        yield binary[begin:end]
        start = end


def _outputs(given: object, binary: object) -> tuple[tuple[str, bool], ...]:
    if not isinstance(binary, bool):
        raise _bad("binary_data_output is neither true nor false")
    if given is None or given == []:
        return tuple((name, binary) for name in _OUTPUT_NAMES)
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise _bad("the request's outputs are no list of objects")
    wanted: dict[str, bool] = {}
    for one in given:
        name = one.get("name")
        if name not in _OUTPUT_NAMES:
            raise _bad(f"there is no output '{shown(str(name))}'; there are {', '.join(_OUTPUT_NAMES)}")
        own = _parameters(one, f"output '{name}'")
        unknown = sorted(set(own) - {"binary_data"})
        if unknown:
            raise _bad(
                f"the output '{name}' has an unknown parameter '{shown(unknown[0])}'; there is binary_data"
            )
        wanted[name] = own.get("binary_data", binary)
        if not isinstance(wanted[name], bool):
            raise _bad("binary_data is neither true nor false")
    return tuple(wanted.items())


def _parameters(given: Mapping[str, Any], of: str) -> dict[str, Any]:
    parameters = given.get("parameters", {})
    if not isinstance(parameters, dict):
        raise _bad(f"the parameters of the {of} are no JSON object")
    return parameters


def _packed(tensor: NDArray[Any] | Sequence[str]) -> bytes:
    if isinstance(tensor, np.ndarray):
        return tensor.astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes()
    encoded = [text.encode() for text in tensor]
    return b"".join(_LENGTH.pack(len(text)) + text for text in encoded)


def _bad(sentence: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, sentence, reason="bad_inference_request")
