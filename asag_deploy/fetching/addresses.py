"""Addresses of bundles and checkpoints: hf://organisation/repository/path@revision, https://host/path."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from asag_deploy.errors import DownloadError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
"""How the names of archives end that a bundle may be packed into."""
WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
"""How the names of checkpoints end, the likeliest first."""

_ADDRESS = re.compile(r"(hf|https?):/{1,2}(?=[^/])", re.IGNORECASE)
"""With one slash too, which is what a `Path` makes of two."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class HubPlace(NamedTuple):
    """A place in a repository of Hugging Face's hub."""

    repository: str
    path: str
    """Of a file or folder in it, without slashes around; empty for the whole."""
    revision: str | None
    """A branch, tag or commit."""

    def __str__(self) -> str:
        path = f"/{self.path}" if self.path else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{path}{revision}"


def address_of(given: str | os.PathLike[str]) -> str | None:
    """Return the address that is given, whole also where it was read as a path; None for a path."""
    text = os.fspath(given)
    found = _ADDRESS.match(text) if isinstance(text, str) else None
    return None if found is None else f"{found[1].lower()}://{text[found.end() :]}"


def hub_place(address: str) -> HubPlace | None:
    """Return the place of an hf:// address, None for another address (DownloadError if it is malformed)."""
    if not address.startswith("hf://"):
        return None
    place, at, revision = address.removeprefix("hf://").rpartition("@")
    if not at:
        place, revision = revision, ""
    parts = [part for part in place.split("/") if part]
    repository = "/".join(parts[:2])
    if not _REPOSITORY.fullmatch(repository) or (at and not revision) or ".." in parts:
        raise DownloadError(f"'{address}' is no address: expected hf://organisation/repository/path@revision")
    return HubPlace(repository, "/".join(parts[2:]), revision or None)


def shown(address: str) -> str:
    """Return an address as messages may show it: without a password, and without its query."""
    if address.startswith("hf://"):
        return address
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def below(address: str, name: str) -> str:
    """Return the address of a file in the folder that has an http(s) address; its query stays."""
    parts = urlsplit(address)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()


def ends_in(address: str, suffixes: tuple[str, ...]) -> bool:
    """Tell whether the path of an address ends in one of these."""
    return urlsplit(address).path.lower().endswith(suffixes)


def cache_folder() -> Path:
    """Return where what is fetched is kept: $ASAG_CACHE_DIR, or ~/.cache/asag-deploy."""
    given = os.environ.get("ASAG_CACHE_DIR")
    try:
        return Path(given).absolute() if given else Path.home() / ".cache" / "asag-deploy"
    except RuntimeError:  # nobody's home
        raise DownloadError("there is no home folder to keep what is fetched: set ASAG_CACHE_DIR") from None
