"""Plots of an evaluation: precision and recall, and the two of the paper's figure 6."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asag_deploy.atomic import atomic_write
from asag_deploy.errors import ConfigError, OutputError, first_line
from asag_deploy.extras import missing
from asag_evaluation.metrics.anchors import LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from asag_evaluation.evaluate import Evaluation

_LEVEL_TITLES = {"P5": "P5 and P6", "P4": "P4 to P6", "P3": "P3 to P6"}
_BACKEND = "MPLBACKEND"
_COLOURS = ("#2a6f97", "#e07a5f", "#81b29a", "#f2cc8f")


def check_plots(program: str = "asag-eval") -> type[Figure]:
    """Import matplotlib and return its type of figures.

    Raises ConfigError if it is missing, naming the extra, or cannot be used as it is installed; OutputError
    where there is no folder for its list of fonts, not even for a moment.
    """
    try:
        with _without_word(), _whatever_backend():
            from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(missing(error, program, purpose="drawing plots")) from None
    except OSError as error:
        raise OutputError(
            "drawing plots needs a folder for the list of fonts: set TMPDIR to one that can be written"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"drawing plots needs matplotlib, which cannot be used here: {first_line(error)}"
        ) from error
    return Figure


@contextmanager
def _without_word() -> Iterator[None]:
    """Keep matplotlib from telling that it takes a folder for the moment where its own cannot be written."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _whatever_backend() -> Iterator[None]:
    """Let the body import matplotlib whatever backend MPLBACKEND names: figures in files need none of them.

    Notebooks name theirs to the programs that are started in them, whose Python may not have it.
    """
    named = None if "matplotlib" in sys.modules else os.environ.pop(_BACKEND, None)
    try:
        yield
    finally:
        if named is not None:
            os.environ[_BACKEND] = named
    if named:
        import matplotlib

        with contextlib.suppress(ValueError):  # for a program around this one that shows figures
            matplotlib.rcParams["backend"] = named


def write_plots(evaluation: Evaluation, output_dir: Path, *, name: str) -> list[Path]:
    """Write the `PLOTS`, and return their paths.

    Raises ConfigError if matplotlib is missing, OutputError if a file cannot be written.
    """
    figure_type = check_plots()
    paths = []
    for file, draw in PLOTS.items():
        figure = figure_type(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes, evaluation)
        axes.set_title(name, fontsize=10)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        with atomic_write(output_dir / file) as temporary:
            figure.savefig(temporary, dpi=140)
        paths.append(output_dir / file)
    return paths


def _precision_recall(axes: Axes, evaluation: Evaluation) -> None:
    for (iou, curve), colour in zip(evaluation.coco.precision.items(), _COLOURS, strict=False):
        recall = np.linspace(0, 1, len(curve))
        axes.plot(recall, curve, color=colour, label=f"IoU {iou}: AP {100 * curve.mean():.1f}")
        axes.fill_between(recall, curve, color=colour, alpha=0.12, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.legend(frameon=False)


def _exit_levels(axes: Axes, evaluation: Evaluation) -> None:
    by_kind = evaluation.anchors.exit_levels_of_kind or {"images": evaluation.anchors.exit_levels}
    total = max(evaluation.images, 1)
    below = np.zeros(len(LEVELS))
    for (kind, counts), colour in zip(by_kind.items(), _COLOURS, strict=False):
        heights = np.array([counts[level] for level in LEVELS], dtype=float)
        axes.bar([_LEVEL_TITLES[level] for level in LEVELS], heights, 0.6, below, color=colour, label=kind)
        below += heights
    for position, height in enumerate(below):
        axes.annotate(f"{height / total:.0%}", (position, height), ha="center", va="bottom")
    axes.set(xlabel="levels that were used", ylabel="images", ylim=(0, 1.1 * max(below.max(), 1)))
    if len(by_kind) > 1:
        axes.legend(frameon=False)


def _anchors_objects(axes: Axes, evaluation: Evaluation) -> None:
    points = np.array(evaluation.anchors.points, dtype=float).reshape(-1, 2)
    axes.scatter(points[:, 0], points[:, 1], s=14, color=_COLOURS[0], alpha=0.5, linewidths=0)
    correlation = evaluation.anchors.correlation
    if correlation is not None:
        slope, offset = np.polyfit(points[:, 0], points[:, 1], 1)
        ends = np.array([points[:, 0].min(), points[:, 0].max()])
        axes.plot(ends, slope * ends + offset, color=_COLOURS[1], label=f"correlation {correlation:.2f}")
        axes.legend(frameon=False)
    axes.set(xlabel="objects", ylabel="anchors", ylim=(0, None))


PLOTS: dict[str, Callable[[Axes, Evaluation], None]] = {
    "precision_recall.png": _precision_recall,
    "exit_levels.png": _exit_levels,
    "anchors_objects.png": _anchors_objects,
}
"""Each plot's file, and what draws it."""
