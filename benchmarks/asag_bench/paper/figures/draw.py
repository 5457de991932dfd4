"""Draw the figures that were asked for, and say of each that cannot be drawn what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asag_bench.light_peers.peer import load_peer
from asag_bench.paper.figures.boxes import write_pipeline, write_probing, write_training
from asag_bench.paper.figures.maps import (
    ScoreSource,
    scores_of_network,
    scores_of_peer,
    write_maps,
    write_overview,
)
from asag_bench.paper.figures.plots import Point, write_adaptation, write_norm, write_speed
from asag_bench.paper.measuring import Measurer
from asag_deploy.errors import ConfigError
from asag_evaluation.data.coco import Sample
from asag_evaluation.predictor import Predictor
from asag_training.evaluation.checkpoint_predictor import checkpoint_predictor
from asag_training.evaluation.sweep import Way, way_predictor

NUMBERS = ("1", "3", "5", "6", "7", "8", "A-1", "C-2", "C-3")
FILES = tuple(f"figure-{number}.png" for number in NUMBERS if number != "C-3")
"""What is written but for the maps of each picture (C-3), whose names hold the picture's."""
_OF_A_NETWORK = ("1", "3", "6", "7", "8", "C-2", "C-3")
_NO_NETWORK = "needs a network: give one as --network ROLE=FILE"
_NO_RUN = "needs several checkpoints of one run, in their order: give each as --run FILE"
_ROWS = 4
"""Pictures of which figures have a row each, at most."""


@dataclass
class Drawn:
    """The files that were written, and why others were not."""

    paths: list[Path] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """By the number of a figure."""


def check_numbers(only: Sequence[str]) -> tuple[str, ...]:
    """Return the figures of these numbers; none: all (ConfigError for what cannot be drawn)."""
    for number in only:
        if number not in NUMBERS:
            raise ConfigError(
                f"figure '{number}' is none that is drawn of results; those are {', '.join(NUMBERS)}"
            )
    return tuple(only) or NUMBERS


def draw(
    numbers: Sequence[str], measurer: Measurer, output_dir: Path, *, run: Sequence[Path], pictures: int
) -> Drawn:
    """Draw figures to a folder.

    run: checkpoints of one training run, for figure 5; pictures: how many are drawn on.
    Raises what measuring does, ConfigError where matplotlib is missing, and OutputError if a file cannot be
    written.
    """
    drawn = Drawn()
    samples = [measurer.dataset[i] for i in range(min(pictures, len(measurer.dataset)))]
    draw_each: dict[str, Callable[[], Path]] = {"A-1": lambda: write_norm(output_dir / "figure-A-1.png")}
    reference = measurer.reference
    if reference is not None:
        draw_each |= _of_network(reference[0], measurer, output_dir, samples)
    if run:
        draw_each["5"] = lambda: _training(run, measurer, output_dir, samples[:_ROWS])
    for number in numbers:
        if number in draw_each:
            drawn.paths.append(draw_each[number]())
        elif number in _OF_A_NETWORK and number != "C-3":
            drawn.missing[number] = _NO_NETWORK
        elif number == "5":
            drawn.missing[number] = _NO_RUN
    if "C-3" in numbers:
        sources = _sources(measurer)
        for sample in samples[:_ROWS] if sources else ():
            drawn.paths.append(
                write_maps(output_dir / f"figure-C-3-image{sample.image_id}.png", sources, sample)
            )
        if not sources:
            drawn.missing["C-3"] = _NO_NETWORK
    return drawn


def _of_network(
    role: str, measurer: Measurer, output_dir: Path, samples: Sequence[Sample]
) -> dict[str, Callable[[], Path]]:
    """Return what draws the figures that take a network, by number."""

    def predictor() -> Predictor:
        return way_predictor(measurer.checkpoint(role), Way())

    def adaptation() -> Path:
        measurer.measure({role: [Way()]})
        figures = measurer.figures(role, Way()) or {}
        return write_adaptation(output_dir / "figure-6.png", figures, measurer.networks[role].config.variant)

    def overview(number: str) -> Callable[[], Path]:
        path = output_dir / f"figure-{number}.png"
        return lambda: write_overview(path, _sources(measurer), samples[:_ROWS])

    return {
        "1": lambda: write_speed(output_dir / "figure-1.png", _points(measurer)),
        "3": overview("3"),
        "6": adaptation,
        "7": overview("7"),
        "8": lambda: write_probing(output_dir / "figure-8.png", predictor(), samples),
        "C-2": lambda: write_pipeline(output_dir / "figure-C-2.png", predictor(), samples[:_ROWS]),
    }


def _sources(measurer: Measurer) -> Mapping[str, ScoreSource]:
    """Return what computes the maps of every network and peer that was given."""
    found = {role: scores_of_network(measurer.checkpoint(role)) for role in measurer.networks}
    return found | {role: scores_of_peer(load_peer(path)) for role, path in measurer.given.peers.items()}


def _points(measurer: Measurer) -> list[Point]:
    """Measure speed and AP of all that was given; ASAG at each of its stops."""
    stops = [Way(max_level="P5"), Way(max_level="P4"), Way()]
    needed = dict.fromkeys(measurer.networks, stops) | {role: [Way()] for role in measurer.peers}
    measurer.measure(needed)
    points = []
    for role, ways in needed.items():
        for way in ways:
            figures, fps = measurer.figures(role, way) or {}, measurer.speed(role, way.max_level)
            if fps is not None and figures.get("AP") is not None:
                points.append(Point(role, figures["#An"], fps, figures["AP"]))
    return points


def _training(run: Sequence[Path], measurer: Measurer, output_dir: Path, samples: Sequence[Sample]) -> Path:
    predictors = [checkpoint_predictor(path, classes=lambda: measurer.dataset.categories) for path in run]
    titles = [path.stem for path in run]
    return write_training(output_dir / "figure-5.png", predictors, titles, samples)
