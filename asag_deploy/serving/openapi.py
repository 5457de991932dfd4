"""The OpenAPI document of the server: paths from `endpoints`, parameters from `options`, limits as set."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from asag_deploy._version import __version__
from asag_deploy.bundle.manifest import Manifest
from asag_deploy.loop.trace import StopReason
from asag_deploy.plain_numbers import REAL, WHOLE
from asag_deploy.serving.endpoints import ENDPOINTS, Endpoint
from asag_deploy.serving.forms import IMAGE_FIELD
from asag_deploy.serving.limits import Limits
from asag_deploy.serving.options import MOST_DEADLINE_MS, PARAMETERS, Defaults
from asag_deploy.serving.protocol import TIMEOUT
from asag_deploy.serving.tensors import HEADER_LENGTH, INPUT, MOST_IMAGES, OUTPUTS

_JSON = "application/json"
_BOX = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
_IMAGE_TEXT = {"type": "string", "contentEncoding": "base64"}
_INPUT_SHAPE = {
    "type": "array",
    "prefixItems": [{"type": "integer", "minimum": 1, "maximum": MOST_IMAGES}, {"const": 1}],
    "items": {"type": "integer"},
    "minItems": 1,
    "maxItems": 2,
    "description": "[n] or [n, 1], for n images.",
}
_REFUSALS = {
    "400": "No image, a parameter that makes no sense, or a form or a request that cannot be read",
    "404": "Another model or version",
    "405": "Another method than this path has; `Allow` says which it has",
    "408": "The head or the image did not arrive in time",
    "413": "The image has too many bytes or pixels",
    "414": "Path and parameters are too long",
    "415": "The body is compressed, or of several parts that are no form",
    "422": "The body is no image, or a damaged one",
    "431": "Too many headers",
    "500": "The network failed; the log says why",
    "505": "HTTP of another version than 1.0 and 1.1",
    "503": "The server is full, stopping, or the deadline has passed; `Retry-After` says when to ask again",
}
_HEADERS = {
    "405": {"Allow": "The methods that this path has."},
    "503": {"Retry-After": "The seconds after which to ask again."},
}
"""What refusals have beside the sentence, by status."""
_OF_READING = ("405", "414", "431", "503", "505")
_OF_DETECTING = (*_OF_READING, "400", "408", "413", "415", "422", "500")


def document(manifest: Manifest, limits: Limits, defaults: Defaults) -> dict[str, Any]:
    """Write the document, for a bundle that is served within limits."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(
            endpoint, manifest, limits, defaults
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "asag-serve",
            "version": __version__,
            "description": "Object detection. Answers have an `X-Request-Id`, the request's if it has one.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": _schemas()},
    }


def _operation(endpoint: Endpoint, manifest: Manifest, limits: Limits, defaults: Defaults) -> dict[str, Any]:
    segments = re.findall(r"{(\w+)}", endpoint.path)
    detecting = endpoint.method == "POST"
    statuses = [*(_OF_DETECTING if detecting else _OF_READING), *(["404"] if segments else [])]
    operation: dict[str, Any] = {
        "operationId": endpoint.handler + ("_by_version" if "version" in segments else ""),
        "summary": endpoint.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in segments
        ],
        "responses": {
            "200": _ANSWERS[endpoint.handler],
            **{status: _refusal(status) for status in sorted(statuses)},
        },
    }
    if endpoint.handler == "detect":
        operation["parameters"] += [
            {
                "name": name,
                "in": "query",
                "required": False,
                "schema": schema,
                "description": schema["description"],
            }
            for name, schema in option_schemas(manifest, defaults).items()
        ]
        operation["requestBody"] = _image_body(manifest, limits, defaults)
    elif endpoint.handler == "v2_infer":
        operation["parameters"].append(
            {
                "name": HEADER_LENGTH,
                "in": "header",
                "required": False,
                "schema": {"type": "integer", "minimum": 1},
                "description": "How many bytes the JSON has, where binary tensors follow it.",
            }
        )
        operation["requestBody"] = _infer_body(manifest, defaults)
    return operation


def option_schemas(manifest: Manifest, defaults: Defaults) -> dict[str, dict[str, Any]]:
    """Return the schemas of what a request may ask for, by name."""
    given = dataclasses.asdict(defaults)
    schemas = {}
    for parameter in PARAMETERS:
        schema = {**parameter.schema(manifest), "description": parameter.text}
        if given.get(parameter.name) is not None:
            schema["default"] = given[parameter.name]
        schemas[parameter.name] = schema
    return schemas


def _also_as_text(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a number in JSON that may also be given as text, as some clients do.

    The text's range is the number's, which no schema can say.  Other schemas stay as they are.
    """
    if schema["type"] not in ("integer", "number"):
        return schema
    pattern = WHOLE if schema["type"] == "integer" else REAL
    return {**schema, "type": [schema["type"], "string"], "pattern": f"^({pattern})$"}


def _image_body(manifest: Manifest, limits: Limits, defaults: Defaults) -> dict[str, Any]:
    image = {"type": "string", "format": "binary"}
    text = f"An image file of {limits.max_bytes} bytes and {limits.max_pixels} pixels at most."
    form = {
        "type": "object",
        "required": [IMAGE_FIELD],
        "properties": {IMAGE_FIELD: image, **option_schemas(manifest, defaults)},
    }
    return {
        "required": True,
        "description": f"{text} Whatever type it claims, it is read as an image unless it is a form.",
        "content": {
            "image/*": {"schema": image},
            "application/octet-stream": {"schema": image},
            "multipart/form-data": {"schema": form},
        },
    }


def _infer_body(manifest: Manifest, defaults: Defaults) -> dict[str, Any]:
    timeout = {
        "type": "number",
        "minimum": 0,
        "maximum": MOST_DEADLINE_MS * 1000,
        "description": "`deadline_ms`, in microseconds; 0 for none.",
    }
    binary = {"type": "boolean", "default": False, "description": "Whether outputs are binary tensors."}
    own = {name: _also_as_text(schema) for name, schema in option_schemas(manifest, defaults).items()}
    options = {**own, TIMEOUT: timeout, "binary_data_output": binary}
    the_input = {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"const": INPUT},
            "shape": _INPUT_SHAPE,
            "datatype": {"const": "BYTES"},
            "data": {
                "type": "array",
                "items": {"anyOf": [_IMAGE_TEXT, {**_array(_IMAGE_TEXT), "minItems": 1, "maxItems": 1}]},
                "description": "The image files as base64, each alone or in a list of its own.",
            },
            "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer"}}},
        },
    }
    output = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"enum": [spec.name for spec in OUTPUTS]},
            "parameters": {"type": "object", "properties": {"binary_data": {"type": "boolean"}}},
        },
    }
    schema = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object", "properties": options, "additionalProperties": False},
            "inputs": {"type": "array", "items": the_input, "minItems": 1, "maxItems": 1},
            "outputs": {"type": "array", "items": output},
        },
    }
    return {
        "required": True,
        "content": {
            _JSON: {"schema": schema},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }


def _answer(schema: str) -> dict[str, Any]:
    return {
        "description": "The answer",
        "content": {_JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }


def _refusal(status: str) -> dict[str, Any]:
    refusal = {**_answer("Error"), "description": _REFUSALS[status]}
    headers = {
        name: {"description": text, "required": status == "405", "schema": {"type": "string"}}
        for name, text in _HEADERS.get(status, {}).items()
    }
    return {**refusal, "headers": headers} if headers else refusal


_ANSWERS = {
    "detect": _answer("Detections"),
    "health": _answer("Health"),
    "metrics": {"description": "The figures", "content": {"text/plain": {"schema": {"type": "string"}}}},
    "openapi": {"description": "This document", "content": {_JSON: {"schema": {"type": "object"}}}},
    "v2_server": _answer("Server"),
    "v2_live": _answer("Live"),
    "v2_ready": _answer("Ready"),
    "v2_model": _answer("Model"),
    "v2_model_ready": _answer("ModelReady"),
    "v2_infer": {
        "description": "The tensors, after the JSON where they are asked for as binary data",
        "content": {
            **_answer("InferResponse")["content"],
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}
"""By handler, the answer of status 200."""


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _schemas() -> dict[str, Any]:
    text, whole, number, yes = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
    tensor = _object({"name": text, "datatype": text, "shape": _array(whole)})
    level = {
        "level": {"enum": ["P5", "P4", "P3"]},
        **dict.fromkeys(("patches", "patches_dropped", "anchors", "selected"), whole),
        "patch_boxes": _array(_BOX),
    }
    trace = {
        "exit_level": {"enum": ["P5", "P4", "P3"]},
        "stop": {"enum": [reason.value for reason in StopReason]},
        "anchor_count": whole,
        "levels": _array(_object(level)),
    }
    detection = {"box": _BOX, "confidence": number, "class_id": whole, "category_id": whole, "name": text}
    health = {
        **dict.fromkeys(("status", "version", "variant", "backend"), text),
        "trained": yes,
        "classes": whole,
        "requests": whole,
    }
    output = {
        "name": text,
        "datatype": text,
        "shape": _array(whole),
        "data": {"type": "array"},
        "parameters": {"type": "object"},
    }
    response = {"model_name": text, "model_version": text, "id": text}
    return {
        "Error": _object(
            {"error": {"type": "string", "description": "One sentence."}, "ready": yes, "name": text},
            ("ready", "name"),
        ),
        "Trace": _object(trace),
        "Detections": _object(
            {
                "width": whole,
                "height": whole,
                "detections": _array(_object(detection)),
                "anchors": _array(_BOX),
                "trace": {"$ref": "#/components/schemas/Trace"},
                "times_ms": {"type": "object", "additionalProperties": number},
            }
        ),
        "Health": _object(health),
        "Server": _object({"name": text, "version": text, "extensions": _array(text)}),
        "Live": _object({"live": yes}),
        "Ready": _object({"ready": yes}),
        "ModelReady": _object({"name": text, "ready": yes}),
        "Model": _object(
            {
                "name": text,
                "versions": _array(text),
                "platform": text,
                "inputs": _array(tensor),
                "outputs": _array(tensor),
                "properties": {"type": "object", "additionalProperties": text},
            }
        ),
        "InferResponse": _object(
            {**response, "outputs": _array(_object(output, ("data", "parameters")))}, ("id",)
        ),
    }
