"""The two pictures of a front: accuracy against time, and how times vary from picture to picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from asag_bench.front.result import ADAPTIVE, ALWAYS, Contender, Front
from asag_bench.front.table import in_threads
from asag_deploy.atomic import atomic_write
from asag_evaluation.plots import check_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRONT, TIMES = "front.png", "times.png"
_COLOURS = ("#2a6f97", "#e07a5f", "#81b29a", "#6d597a", "#bc6c25", "#5c5c5c")
_MARKERS = {"P5": "v", "P4": "s", ADAPTIVE: "o", ALWAYS: "^", None: "D"}
_BINS = 40


def write_plots(front: Front, output_dir: Path) -> list[Path]:
    """Draw both pictures to `output_dir` and return their paths (OutputError if one cannot be written)."""
    figure_type = check_plots("asag-bench")
    backends = list(dict.fromkeys(each.backend for each in front.contenders))
    title = f"{front.pictures.data}, {front.machine.processor}, {in_threads(front.threads)}"
    paths = []
    for file, rows in ((FRONT, 1), (TIMES, 2)):
        figure = figure_type(figsize=(5.4 * len(backends), 4.2 * rows), layout="constrained")
        axes = figure.subplots(rows, len(backends), squeeze=False)
        for column, backend in enumerate(backends):
            of_backend = [each for each in front.contenders if each.backend == backend]
            if file == FRONT:
                _front(axes[0][column], of_backend)
            else:
                _histogram(axes[0][column], of_backend)
                _against_objects(axes[1][column], of_backend, front.pictures.objects)
            axes[0][column].set_title(backend, fontsize=10)
        figure.suptitle(title, fontsize=9)
        with atomic_write(output_dir / file) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
        paths.append(output_dir / file)
    return paths


def _front(axes: Axes, contenders: Sequence[Contender]) -> None:
    """Draw AP against the mean time of a picture: a mark for each seed, a line through ASAG's stops."""
    for colour, (network, group) in zip(_COLOURS, _by_network(contenders).items(), strict=False):
        seeds = defaultdict(list)
        for each in group:
            if each.ap is not None:
                seeds[each.weights].append(each)
        for i, of_seed in enumerate(seeds.values()):
            points = sorted((each.mean_ms, 100 * (each.ap or 0), each.stop) for each in of_seed)
            on_line = [point for point in points if point[2] != ALWAYS]
            axes.plot([p[0] for p in on_line], [p[1] for p in on_line], color=colour, linewidth=1, alpha=0.6)
            for ms, ap, stop in points:
                axes.plot(
                    ms, ap, _MARKERS[stop], color=colour, label=f"{network}, {stop}" if stop else network
                ) if i == 0 else axes.plot(ms, ap, _MARKERS[stop], color=colour)
    axes.set_xlabel("mean time of a picture, ms")
    axes.set_ylabel("AP, 300 detections a picture")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _histogram(axes: Axes, contenders: Sequence[Contender]) -> None:
    """Draw how many pictures take how long, ASAG deciding by itself."""
    shown = _shown(contenders)
    longest = max(float(np.percentile(each.ms, 99)) for each in shown)
    edges = np.linspace(0, longest * 1.05, _BINS + 1)
    for colour, each in zip(_COLOURS, shown, strict=False):
        axes.hist(
            np.clip(each.ms, 0, edges[-1]), bins=list(edges), color=colour, alpha=0.55, label=_title(each)
        )
    axes.set_xlabel("time of a picture, ms")
    axes.set_ylabel("pictures")
    axes.legend(fontsize=7)


def _against_objects(axes: Axes, contenders: Sequence[Contender], objects: Sequence[int]) -> None:
    """Draw each picture's time against how many objects it has."""
    for colour, each in zip(_COLOURS, _shown(contenders), strict=False):
        axes.scatter(objects, each.ms, s=9, color=colour, alpha=0.5, linewidths=0, label=_title(each))
    axes.set_xlabel("objects in the picture")
    axes.set_ylabel("time, ms")
    if max(objects, default=0) > 40:
        axes.set_xscale("symlog", linthresh=10)
    axes.set_ylim(0, 1.1 * max(float(np.percentile(each.ms, 99)) for each in _shown(contenders)))
    axes.legend(fontsize=7)


def _shown(contenders: Sequence[Contender]) -> list[Contender]:
    """Return the first of the seeds of each network, and of ASAG the one that decides by itself."""
    return [
        next(each for each in group if each.stop in (ADAPTIVE, None))
        for group in _by_network(contenders).values()
    ]


def _title(contender: Contender) -> str:
    name = contender.network if contender.stop is None else f"{contender.network}, {contender.stop}"
    return f"{name} (mean {fmean(contender.ms):.1f} ms)"


def _by_network(contenders: Sequence[Contender]) -> dict[str, list[Contender]]:
    groups = defaultdict(list)
    for each in contenders:
        groups[each.network].append(each)
    return groups
