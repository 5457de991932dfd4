"""What all figures have in common: grids of pictures with titles, and files that are written whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.atomic import atomic_write
from asag_evaluation.plots import check_plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROGRAM = "asag-paper"
COLOURS = ("#2a6f97", "#e07a5f", "#5a9e7c", "#6d597a", "#bc6c25", "#5c5c5c", "#c9184a", "#00a6a6")
_LEAST_SIDE = 640
_INCHES, _DPI = 3.0, 130
_TITLE_ROOM = 0.28
"""Inches for a row's titles."""

Picture = NDArray[np.uint8]


def enlarged(picture: Picture) -> tuple[Picture, float]:
    """Return a picture that is large enough to draw on, and how many times it was enlarged."""
    times = max(1.0, _LEAST_SIDE / min(picture.shape[:2]))
    if times == 1.0:
        return picture.copy(), times
    size = round(picture.shape[1] * times), round(picture.shape[0] * times)
    return np.ascontiguousarray(cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)), times


def new_figure(width: float, height: float) -> Figure:
    """Open a figure of so many inches (ConfigError where matplotlib is missing)."""
    return check_plots(PROGRAM)(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, and return its path (OutputError if it cannot be written)."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png")
    return path


def write_grid(
    path: Path,
    rows: Sequence[Sequence[Picture | None]],
    titles: Sequence[str],
    names: Sequence[str] = (),
    heading: str = "",
) -> Path:
    """Write pictures in rows and columns: titles over the columns, names at the left of the rows.

    None leaves a place empty.  Every row is as high as its pictures need; a heading stands over all.
    """
    columns = len(titles)
    heights = [max(_ratio(picture) for picture in row if picture is not None) for row in rows]
    left = 0.3 if any(names) else 0.0
    width = columns * _INCHES + left
    height = sum(_INCHES * ratio for ratio in heights) + _TITLE_ROOM * (1 + bool(heading))
    figure = new_figure(width, height)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    axes: Any = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for i, row in enumerate(rows):
        for j in range(columns):
            place, picture = axes[i][j], row[j] if j < len(row) else None
            place.set_xticks([])
            place.set_yticks([])
            for spine in place.spines.values():
                spine.set_visible(False)
            if picture is not None:
                place.imshow(picture, aspect="equal", interpolation="hanning")
            if i == 0:
                place.set_title(titles[j], fontsize=9)
            if j == 0 and names:
                place.set_ylabel(names[i], fontsize=8)
    if heading:
        figure.suptitle(heading, fontsize=9)
    return save(figure, path)


def _ratio(picture: Picture) -> float:
    return float(picture.shape[0] / picture.shape[1])
