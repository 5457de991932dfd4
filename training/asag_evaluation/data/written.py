"""Annotation files that this project writes, told from those that it must not replace."""

from __future__ import annotations

import json
from pathlib import Path

from asag_deploy.errors import OutputError


def check_ours(file: Path, description: str) -> None:
    """Raise OutputError if an annotation file is there that is not described so, by `info.description`."""
    if not file.exists():
        return
    try:
        content = json.loads(file.read_bytes())
        described = str(content["info"]["description"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        described = ""
    if description not in described:
        raise OutputError(
            f"there is a '{file}' already that was not written by this: remove it, or choose another "
            "--output-dir or --split"
        )
