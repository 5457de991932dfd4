"""What may be replaced: files that this project's programs made, told by what is in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from asag_deploy.errors import OutputError

_SYSTEM = (("/", "dev"), ("/", "proc"))


def check_own_file(path: Path | None, is_own: Callable[[Path], bool], what: str) -> None:
    """Raise OutputError if a file is there that `is_own` does not take for one of ours, which are `what`.

    An empty file, a device, a pipe, and what another program has open, are nobody's; None is no file.
    """
    if path is None or not path.is_file() or path.parts[:2] in _SYSTEM:
        return
    try:
        if path.stat().st_size == 0 or is_own(path):
            return
    except OSError:
        return  # writing will tell
    raise OutputError(
        f"'{path}' is there and holds something else than {what}, so it is not replaced: choose another "
        "name, or remove it"
    )


def check_own_folder(folder: Path, names: Sequence[str], is_own: Callable[[Path], bool], what: str) -> None:
    """Raise OutputError if a folder holds one of these files, but not the first, by which we know our own.

    is_own: what takes the first of them for ours, which is `what`.
    """
    first = folder / names[0]
    if first.exists():
        check_own_file(first, is_own, what)
        return
    for name in names[1:]:
        if (folder / name).exists():
            raise OutputError(
                f"'{folder / name}' is there, but no '{names[0]}' beside it that holds {what}, so it is not "
                "replaced: choose another folder, or remove it"
            )


def is_json_with(*keys: str) -> Callable[[Path], bool]:
    """Return what tells whether a file is a JSON object that has all these keys."""

    def is_own(path: Path) -> bool:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return False
        return isinstance(content, dict) and content.keys() >= set(keys)

    return is_own
