"""Which files make a bundle: those that its manifest names, before anything else in it is looked at."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from asag_deploy.errors import DownloadError

MANIFEST = "manifest.json"

_MOST = 100


def files_named(manifest: bytes, address: str) -> dict[str, str]:
    """Return the files that the content of a manifest names, with the SHA-256 of each.

    Loading says what else may be wrong with it.  Raises DownloadError if it is no manifest, or names a file
    outside its folder.
    """
    try:
        files = {graph["file"]: graph["sha256"] for graph in json.loads(manifest)["graphs"]}
    except (ValueError, LookupError, TypeError, RecursionError):
        files = {}
    texts = [text for entry in files.items() for text in entry]
    if not files or len(files) > _MOST or not all(isinstance(text, str) and text for text in texts):
        raise DownloadError(f"what lies at '{address}' is no manifest of a bundle: check the address")
    for file in files:
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file:
            raise DownloadError(f"the manifest at '{address}' names '{file}', which lies outside the bundle")
    return files
