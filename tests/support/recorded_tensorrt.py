"""A TensorRT made of its recorded signatures: it computes nothing, but takes only what the real one takes.

Every name that is used must be in the record, every call must fit one of its recorded signatures, and only
recorded properties can be set.  What was called is kept in `calls`.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIGNATURES = Path(__file__).parents[1] / "deploy" / "engines" / "signatures"
RECORDS = sorted(path.stem for path in SIGNATURES.glob("*.json"))
RTX = "tensorrt-rtx-1.7.1.116"
OLDEST, NEWEST = "tensorrt-10.0.1", "tensorrt-11.4.0.106"

_PLACES = {
    "bool": True,
    "int": 0,
    "str": "recorded",
    "None": None,
    "nvonnxparser::IParserError": "ParserError",
    "detail::accessor<detail::accessor_policies::str_attr>": "IPluginRegistry",
}


class HostMemory(bytes):
    """What the real one's IHostMemory is to its users: readable as bytes."""


class RecordedModule(types.ModuleType):
    """The module of one record; set `answers["Class.method"]` to change what a call returns."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(name)
        self.record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.__version__: str = self.record["version"]
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}
        for enumeration, members in self.record["enumerations"].items():
            values = {member: i for i, member in enumerate(members)}
            setattr(self, enumeration, enum.IntEnum(enumeration, values))
        for cls in self.record["classes"]:
            setattr(self, cls, self._class(cls))
        for function, lines in self.record["functions"].items():
            setattr(self, function, self._function(function, lines))

    def called(self, name: str) -> list[dict[str, Any]]:
        """The arguments of every call of `Class.method`."""
        return [arguments for called, arguments in self.calls if called == name]

    def call(self, name: str, lines: Sequence[str], args: Any, kwargs: Any) -> Any:
        """Check a call against the record, note it, and answer."""
        for line in lines:
            signature, result = parse(line)
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                continue
            self.calls.append((name, dict(bound.arguments)))
            return self.answers[name] if name in self.answers else self._answer(result)
        raise TypeError(f"{name}{args}{kwargs} fits none of {list(lines)}")

    def _answer(self, result: str) -> Any:
        place = _PLACES.get(result, result)
        if place == "IHostMemory":
            return HostMemory(b"serialized")
        if isinstance(place, str) and place in self.record["classes"]:
            return Recorded(self, place)
        return Recorded(self, "IPluginRegistry") if place == "object" else place

    def _class(self, cls: str) -> Any:
        if cls == "ILogger":
            severity = enum.IntEnum("severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3})
            return type("ILogger", (), {"Severity": severity})
        lines = self.record["classes"][cls]["__init__"]

        def construct(*args: Any, **kwargs: Any) -> Recorded:
            self.call(f"{cls}.__init__", lines, (None, *args), kwargs)
            return Recorded(self, cls)

        return construct

    def _function(self, name: str, lines: Sequence[str]) -> Any:
        return lambda *args, **kwargs: self.call(name, lines, args, kwargs)


class Recorded:
    """An object of a recorded class."""

    def __init__(self, module: RecordedModule, cls: str) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_cls", cls)

    def _member(self, name: str) -> Any:
        members = self._module.record["classes"][self._cls]
        if name not in members:
            raise AttributeError(f"{self._cls} of {self._module.__version__} has no '{name}'")
        return members[name]

    def __getattr__(self, name: str) -> Any:
        lines = self._member(name)
        full = f"{self._cls}.{name}"
        if lines is None:
            return self._module.answers.get(full, 0)
        return lambda *args, **kwargs: self._module.call(full, lines, (self, *args), kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        assert self._member(name) is None, f"{self._cls}.{name} is a method"
        self._module.calls.append((f"{self._cls}.{name} =", {"value": value}))


def file_of(record: str) -> Path:
    """The file of a record such as `RTX`."""
    return SIGNATURES / f"{record}.json"


def parse(line: str) -> tuple[inspect.Signature, str]:
    """A line such as `parse(self: OnnxParser, model: buffer, path: str = None) -> bool`."""
    found = re.fullmatch(r"\w+\((.*)\) -> (.*)", line)
    assert found is not None, line
    parameters = []
    for text in re.split(r", (?=\w+: )", found[1]) if found[1] else []:
        name = text.partition(":")[0]
        default = None if " = " in text else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
    return inspect.Signature(parameters), found[2]
