"""What processes that are handed a data set, or open it, say of their memory."""

from __future__ import annotations

import json
import pickle
import re
import sys
import zlib
from multiprocessing import context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from asag_evaluation.data import compiled_annotations
from asag_evaluation.data.coco import CocoDataset

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)$")


def used(dataset: CocoDataset) -> int:
    """Look at all annotations, and return their checksum."""
    value = 0
    for record in dataset.records:
        for array in (record.boxes, record.annotated.xywh, record.annotated.area):
            value = zlib.crc32(array.tobytes(), value)
    return value


def report(dataset: CocoDataset, there: Connection) -> None:
    """Say where a data set lies that was handed to this process."""
    checksum = used(dataset)
    there.send({"checksum": checksum, **_mapping(dataset), "received_bytes": len(_as_handed(dataset))})


class _Popen:
    """Takes descriptors, as what starts a process does."""

    def duplicate_for_child(self, descriptor: int) -> int:
        return descriptor

    def DupFd(self, descriptor: int) -> int:
        return descriptor


def _as_handed(dataset: CocoDataset) -> bytes:
    """Return the pickle that a process gets which is started with a data set."""
    context.set_spawning_popen(cast(Any, _Popen()))
    try:
        return pickle.dumps(dataset)
    finally:
        context.set_spawning_popen(None)


def _mapping(dataset: CocoDataset) -> dict[str, Any]:
    """Return what file holds the boxes, and how much of that is in RAM, this process's own and in all."""
    address = dataset.records._flat.boxes.__array_interface__["data"][0]
    found: dict[str, Any] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        mapping = _MAPPING.match(line)
        if mapping is not None:
            begin, end, name = mapping.groups()
            inside = int(begin, 16) <= address < int(end, 16)
            if inside:
                path = Path(name.removesuffix(" (deleted)"))
                found["mapped"] = path.parent.name or path.name
        elif inside and line.startswith("Anonymous:"):
            found["own_kib"] = int(line.split()[1])
        elif inside and line.startswith("Rss:"):
            found["shared_kib"] = int(line.split()[1])
    return found


def main() -> None:
    """Open the data set of the first argument as if it were large; print how often it was read."""
    readings = 0
    read = compiled_annotations._read

    def counted(*arguments: Any) -> Any:
        nonlocal readings
        readings += 1
        return read(*arguments)

    compiled_annotations.LEAST_BYTES = 1
    setattr(compiled_annotations, "_read", counted)  # noqa: B010 (it has another signature)
    dataset = CocoDataset.open(sys.argv[1])
    print(json.dumps({"checksum": used(dataset), "readings": readings}))
