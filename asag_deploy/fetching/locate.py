"""A local path for whatever names a bundle or a checkpoint: itself, or what is fetched from an address.

Nothing is fetched unless an address is given.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from asag_deploy.atomic import atomic_directory
from asag_deploy.errors import AsagError, BundleNotFoundError, CheckpointError, DownloadError, OutputError
from asag_deploy.fetching.addresses import (
    ARCHIVES,
    WEIGHTS,
    address_of,
    below,
    cache_folder,
    ends_in,
    hub_place,
    shown,
)
from asag_deploy.fetching.manifests import MANIFEST, files_named

_LARGEST_MANIFEST = 64 * 2**20


def local_bundle(given: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle: the path that is given, or where the bundle at an address was put.

    An address is hf://organisation/repository/path@revision, or http(s):// of a .zip or .tar of the folder,
    or of the folder itself.  Loading verifies all files.  Raises DownloadError if it cannot be fetched,
    BackendError if a package for it is missing, BundleNotFoundError for an empty path.
    """
    address = address_of(given)
    if address is None:
        return _path(given, BundleNotFoundError)
    place = hub_place(address)
    if place is not None:
        from asag_deploy.fetching.hub import hub_bundle

        return hub_bundle(place)
    if not ends_in(address, ARCHIVES):
        return _folder(address)
    from asag_deploy.fetching.archives import unpacked

    return unpacked(_download(address), shown(address))


def local_checkpoint(given: str | os.PathLike[str]) -> Path:
    """Return the file of a checkpoint, or of other weights: see `local_bundle`.

    An empty path is a CheckpointError.
    """
    address = address_of(given)
    if address is None:
        return _path(given, CheckpointError)
    place = hub_place(address)
    if place is None:
        return _download(address)
    from asag_deploy.fetching.hub import hub_checkpoint

    return hub_checkpoint(place)


def local_model(given: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle or the file of a checkpoint, whichever is there."""
    address = address_of(given)
    place = None if address is None else hub_place(address)
    if address is None:
        return _path(given, BundleNotFoundError)
    if place is None:
        is_bundle = not ends_in(address, WEIGHTS)
    else:
        from asag_deploy.fetching.hub import is_hub_bundle

        is_bundle = not place.path.endswith(WEIGHTS) and is_hub_bundle(place)
    return local_bundle(address) if is_bundle else local_checkpoint(address)


def _path(given: str | os.PathLike[str], kind: type[AsagError]) -> Path:
    """Return the path; an empty one, as of a variable that is not set, would be the working directory."""
    if not os.fspath(given):
        raise kind("an empty path names nothing; give the path or the address of a bundle or checkpoint")
    return Path(given)


def _download(address: str, most: int | None = None) -> Path:
    """Fetch a file; what does so is imported only where something is fetched."""
    from asag_deploy.fetching.web import MOST_BYTES, download

    return download(address, most=most or MOST_BYTES)


def _folder(address: str) -> Path:
    """Fetch the manifest at an address and the files that it names, into a folder of this very manifest."""
    if ends_in(address, (f"/{MANIFEST}",)):
        head, _, tail = address.rpartition(f"/{MANIFEST}")
        address = head + tail
    manifest = _download(below(address, MANIFEST), _LARGEST_MANIFEST).read_bytes()
    named = files_named(manifest, shown(address))
    folder = cache_folder() / "bundles" / hashlib.sha256(manifest).hexdigest()[:32]
    if not folder.is_dir():
        files = {name: _checked(below(address, name), sha256) for name, sha256 in named.items()}
        try:
            with atomic_directory(folder, overwrite=False, marker="") as made:
                (made / MANIFEST).write_bytes(manifest)
                for name, file in files.items():
                    (made / name).parent.mkdir(parents=True, exist_ok=True)
                    _link(file, made / name)
        except OutputError as error:
            if not folder.is_dir():  # unless another process was faster
                raise DownloadError(f"'{shown(address)}' cannot be kept: {error}") from None
    return folder


def _checked(address: str, sha256: str) -> Path:
    """Fetch a file that is to have this checksum, so that nothing is kept as a bundle that is none."""
    file = _download(address)
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() == sha256:
            return file
    raise DownloadError(
        f"'{shown(address)}' is not the file of which the manifest beside it has the SHA-256: try again, in "
        "case they are being replaced, or ask whoever serves them"
    )


def _link(file: Path, name: Path) -> None:
    """Give a file another name; a copy where the file system has no links."""
    try:
        name.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, name)
