"""The pictures that activations are calibrated on: which are refused, and what stages are given of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends import open_network
from asag_deploy.backends.hooked_network import HookedNetwork
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.detector import Detector
from asag_deploy.errors import ConfigError, DataError, SourceError, plural
from asag_deploy.images.reading import RgbImage, read_image
from asag_deploy.images.sources import list_sources
from asag_deploy.loop.stages import Array
from asag_deploy.loop.stopping import stop_rule
from asag_deploy.processing.preprocess import resize
from asag_evaluation.data.image_files import is_file

DEFAULT_COUNT = 64
LEAST = 8
"""Fewer pictures show too little of the range that activations have."""

_LEAST_CONTRAST = 2.0
"""Standard deviation of pixel values, of 255, below which a picture is one colour."""


def image_files(arguments: Sequence[str]) -> list[Path]:
    """List the image files of folders, globs and paths.

    Raises SourceError if one of these gives none, or is not there.
    """
    listing = list_sources(arguments)
    if listing.failures:
        raise SourceError(listing.failures[0].message)
    files = [Path(source.name) for source in listing.sources if source.kind == "image"]
    if not files:
        raise SourceError(
            f"there are no images in {', '.join(arguments)}, only videos or cameras; "
            "calibrate on a folder of pictures"
        )
    gone = next((file for file in files if not is_file(file)), None)
    if gone is not None:
        raise SourceError(f"there is no picture or folder '{gone}'; check the path")
    return files


def check_count(count: int) -> None:
    """Raise ConfigError if fewer pictures than `LEAST` are asked for."""
    if count < LEAST:
        asked = plural(count, "picture is asked for", "pictures are asked for")
        raise ConfigError(f"{asked}; {_why_so_many()}")


def choose(files: Sequence[Path], count: int) -> list[Path]:
    """Choose at most `count` of the files, evenly from first to last.

    Raises ConfigError if fewer than `LEAST` are asked for, DataError if there are fewer.
    """
    check_count(count)
    if len(files) < LEAST:
        there = "is" if len(files) == 1 else "are"
        raise DataError(f"there {there} {plural(len(files), 'picture')} to calibrate on; {_why_so_many()}")
    indices = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
    return [files[i] for i in indices]


def read_pictures(
    files: Sequence[Path], preprocessing: Preprocessing, on_picture: Callable[[], object] = lambda: None
) -> list[RgbImage]:
    """Read the pictures at the size the network sees them.

    Raises ImageError for one that cannot be read, DataError if they show too little: half of them one colour
    each, or fewer than `LEAST` that differ.
    """
    pictures = []
    for file in files:
        pictures.append(resize(read_image(file), preprocessing))
        on_picture()
    _check(pictures)
    return pictures


def stage_inputs(
    bundle: Bundle, stage: str, pictures: Sequence[RgbImage]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield what a quantised stage is given of each picture, as far as its graph takes it."""
    given = _backbone_inputs(bundle, pictures) if stage == "backbone" else _decoder_inputs(bundle, pictures)
    taken = {spec.name for spec in bundle.manifest.graph(stage).inputs}
    return ({name: array for name, array in inputs.items() if name in taken} for inputs in given)


def _backbone_inputs(bundle: Bundle, pictures: Sequence[RgbImage]) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield what the bundle's own pre-processing makes, without running the rest."""
    network = open_network(None, bundle)
    processing = network.processing(bundle.manifest)
    for picture in pictures:
        prepared = processing.prepare([picture], "rgb")
        yield {"image": network.download(prepared.image), "image_size": prepared.sizes}


def _decoder_inputs(bundle: Bundle, pictures: Sequence[RgbImage]) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield what the decoder is given once probing has stopped."""
    network = open_network(None, bundle)
    given: dict[str, NDArray[Any]] = {}

    def note(stage: str, inputs: Mapping[str, Array]) -> None:
        if stage == "decoder":
            given.update((name, network.download(array)) for name, array in inputs.items())

    watched = HookedNetwork(network, before=note)
    with Detector(bundle.manifest, watched, stop_rule(bundle.manifest, None, None)) as detector:
        for picture in pictures:
            given.clear()
            detector(picture, channel_order="rgb")
            yield dict(given)


def check_detectable(pictures: Sequence[RgbImage], detector: Detector, least_score: float) -> None:
    """Raise DataError if a trained network finds nothing in any picture: it has not been made for them."""
    if not detector.manifest.trained or _finds_something(pictures, detector, least_score):
        return
    raise DataError(
        f"the network finds nothing (score {least_score:g} or more) in any of the {len(pictures)} "
        "calibration pictures, so they are not what it was trained for; calibrate on pictures like those "
        "it will see"
    )


def _finds_something(pictures: Sequence[RgbImage], detector: Detector, least_score: float) -> bool:
    return any(
        bool((detector(picture, channel_order="rgb").confidence >= least_score).any()) for picture in pictures
    )


def _check(pictures: Sequence[RgbImage]) -> None:
    plain = sum(float(picture.std(axis=(0, 1)).max()) < _LEAST_CONTRAST for picture in pictures)
    if 2 * plain >= len(pictures):
        raise DataError(
            f"{plain} of the {len(pictures)} calibration pictures are of one colour and say nothing about "
            "activations; calibrate on pictures like those the network will see"
        )
    different = len(set(_digests(pictures)))
    if different < LEAST:
        raise DataError(
            f"only {different} of the {len(pictures)} calibration pictures differ from each other; "
            f"{_why_so_many()}"
        )


def _digests(pictures: Sequence[RgbImage]) -> Iterator[bytes]:
    return (hashlib.sha256(picture.tobytes()).digest() for picture in pictures)


def _why_so_many() -> str:
    return (
        f"give {LEAST} or more (some {DEFAULT_COUNT} are good), since the ranges that activations have in a "
        "few pictures do not hold for others"
    )
