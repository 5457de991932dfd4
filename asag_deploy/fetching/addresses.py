"""Addresses of bundles and checkpoints: hf://organisation/repository/path@revision, https://host/path."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit

from asag_deploy.errors import DownloadError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
"""How the names of archives end that a bundle may be packed into."""
WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
"""How the names of checkpoints end, the likeliest first."""

_ADDRESS = re.compile(r"(hf|https?):(?:/{1,2}(?=[^/])|/*)", re.IGNORECASE)
"""With one slash too, which is what a `Path` makes of two."""
_OTHER = re.compile(r"[a-z][a-z0-9+.-]+:/+", re.IGNORECASE)
"""Of two letters or more: one is a drive of Windows."""
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_TAKEN = "expected hf://organisation/repository/path@revision, https://host/path, or a path"
_AS_THEY_ARE = "/%:@!$&'()*+,;=~?[]"


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
    """Return the address that is given, whole also where it was read as a path; None for a path.

    Raises DownloadError for an address that has no host or is malformed, and for one of another kind, such as
    s3://, unless something lies at that path.
    """
    text: Any = os.fspath(given)
    if not isinstance(text, str):  # a path in bytes
        return None
    found = _ADDRESS.match(text)
    if found is None:
        if _OTHER.match(text) is None or os.path.lexists(text):
            return None
        raise DownloadError(f"'{_as_typed(given)}' is no address that is fetched from: {_TAKEN}")
    if not found[0].endswith("/") and (found.end() < len(text) or os.path.lexists(text)):
        return None  # a file that is called http:x
    scheme, rest = found[1].lower(), text[found.end() :]
    address = f"{scheme}://{rest}"
    if not rest or rest.startswith("/") or (scheme != "hf" and not _has_host(address)):
        raise DownloadError(f"'{_as_typed(given)}' is no address: {_TAKEN}")
    return address


def _as_typed(given: str | os.PathLike[str]) -> str:
    """Return what may be shown of an address, with the slashes that a `Path` has left out."""
    text = _without_secrets(os.fspath(given))
    scheme, colon, rest = text.partition(":/")
    if isinstance(given, str) or not colon or rest.startswith("/"):
        return text
    return f"{scheme}:///{rest}" if scheme.lower() == "file" else f"{scheme}://{rest}"


def _without_secrets(address: str) -> str:
    """Return what may be shown of an address that may be malformed."""
    return re.sub(r"(:/+)[^/]*@", r"\1", address.partition("?")[0])


def _has_host(address: str) -> bool:
    """Tell whether an http(s) address names a host, and a port that there may be."""
    try:
        parts = urlsplit(address)
        host, _ = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:
        return False
    # A `Path` leaves one slash of http:///x.zip, so that a file stands where the host should.
    is_file = not parts.path and parts.netloc.lower().endswith(ARCHIVES + WEIGHTS)
    return bool(host) and not is_file and not any(letter <= b" "[0] for letter in host)


def hub_place(address: str) -> HubPlace | None:
    """Return the place of an hf:// address, None for another address (DownloadError if it is malformed)."""
    if not address.startswith("hf://"):
        return None
    place, at, revision = address.removeprefix("hf://").rpartition("@")
    if not at:
        place, revision = revision, ""
    parts = [part for part in place.split("/") if part]
    repository = "/".join(parts[:2])
    is_malformed = (
        (at and not revision) or ".." in parts or ".." in revision or revision.startswith(("/", "-"))
    )
    if not _REPOSITORY.fullmatch(repository) or is_malformed:
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


def as_asked(address: str) -> tuple[str, str | None]:
    """Return an http(s) address as it is sent, in ASCII and without a login, and the login, user:password."""
    parts = urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    if not host.isascii():
        name, colon, port = host.partition(":")
        host = f"{name.encode('idna').decode()}{colon}{port}"
    path, query = (quote(text, safe=_AS_THEY_ARE) for text in (parts.path, parts.query))
    return SplitResult(parts.scheme, host, path, query, "").geturl(), unquote(user) if at else None


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
