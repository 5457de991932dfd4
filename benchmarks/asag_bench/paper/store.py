"""What has been measured, by what it is of, and kept as it comes: an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asag_bench.result import json_text
from asag_deploy.atomic import atomic_write_text, check_writable
from asag_deploy.replacing import check_own_folder, is_json_with
from asag_evaluation.data.coco import CocoDataset

RESULT, PAGE = "paper.json", "paper.md"
_MEASURED = "measured"

Figures = dict[str, Any]
"""Numbers by the titles of columns, shares in percent; None for what there was nothing to measure of."""


class Store:
    """Figures by what they are of, in `paper.json` of a folder, or in memory alone."""

    def __init__(self, folder: Path | None, command: str, files: Sequence[str] = ()) -> None:
        """Take up what an earlier run has left in the folder.

        files: what else the run may write there.  Raises OutputError if the folder cannot be written, or if
        one of these files is there that no such run has made.
        """
        self._folder, self._command = folder, command
        self._entries: dict[str, Figures] = {}
        self._more: dict[str, Any] = {}
        if folder is not None:
            is_own = is_json_with("command", _MEASURED)
            check_own_folder(folder, (RESULT, PAGE, *files), is_own, "the paper's tables")
            check_writable(folder)
            if (folder / RESULT).is_file():
                content = json.loads((folder / RESULT).read_bytes())
                self._entries = _entries(content.pop(_MEASURED))
                self._more = content
            self.write({})

    def get(self, *of: Any) -> Figures | None:
        """Return the figures of this, if they have been measured."""
        return self._entries.get(_key(of))

    def put(self, figures: Figures, *of: Any) -> None:
        """Keep figures, at once."""
        self._entries[_key(of)] = figures
        self.write({})

    def write(self, more: Mapping[str, Any]) -> None:
        """Write all figures, and more beside them.  Raises OutputError if that fails."""
        self._more.update(more)
        if self._folder is not None:
            content = {**self._more, "command": self._command, _MEASURED: self._entries}
            atomic_write_text(self._folder / RESULT, json_text(content))


def _key(of: tuple[Any, ...]) -> str:
    return json.dumps(of, sort_keys=True)


def _entries(found: Any) -> dict[str, Figures]:
    """Return the figures of an earlier run; what is none of ours is left out."""
    if not isinstance(found, dict):
        return {}
    return {name: figures for name, figures in found.items() if isinstance(figures, dict)}


def file_id(path: Path) -> str:
    """Tell a file by its content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def data_id(dataset: CocoDataset) -> str:
    """Tell images and annotations by what is in the annotation file."""
    digest = hashlib.sha256()
    for record in dataset.records:
        digest.update(repr((record.image_id, record.file_name, record.height, record.width)).encode())
        digest.update(record.boxes.tobytes() + record.labels.tobytes())
    return digest.hexdigest()[:16]
