"""An evaluation as a person reads it, and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from asag_deploy.atomic import atomic_write_text, check_writable
from asag_deploy.errors import plural
from asag_deploy.replacing import check_own_folder, is_json_with
from asag_evaluation.evaluate import Evaluation
from asag_evaluation.metrics.coco import CocoMetrics
from asag_evaluation.plots import PLOTS, check_plots, write_plots

_PRECISIONS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "small": "ap_small",
    "medium": "ap_medium",
    "large": "ap_large",
}
_RECALLS = {
    "AR 1": "ar_1",
    "AR 10": "ar_10",
    "AR 100": "ar_100",
    "small": "ar_small",
    "medium": "ar_medium",
    "large": "ar_large",
}
_FIGURES, _DETECTIONS = "evaluation.json", "detections.json"
_WIDTH = 8
_MOST_CLASSES = 20


def precision_lines(found: CocoMetrics, most: int = 100) -> list[str]:
    """Return average precision and recall in a few lines, in percent.

    most: the detections of an image that were measured.
    """
    recalls = {name if name != "AR 100" else f"AR {most}": key for name, key in _RECALLS.items()}
    return [*_block(found, _PRECISIONS), *_block(found, recalls)]


def table(evaluation: Evaluation) -> str:
    """Return the figures in a few lines, in percent as the paper gives them."""
    coco, anchors = evaluation.coco, evaluation.anchors
    lines = [
        (
            f"{plural(evaluation.images, 'image')}, {plural(evaluation.objects, 'object')}, "
            f"{evaluation.ms_per_image:.0f} ms an image"
        ),
        "",
        *precision_lines(coco),
        *_class_lines(coco.ap_of_class),
        "",
        _recall_line("anchors", evaluation.anchor_recall),
    ]
    if evaluation.proposal_recall is not None:
        lines.append(_recall_line("proposals", evaluation.proposal_recall))
    correlation = "-" if anchors.correlation is None else f"{anchors.correlation:.2f}"
    lines += [
        (
            f"#An {anchors.anchors:.1f}, N_P4 {anchors.patches_p4:.1f}, N_P3 {anchors.patches_p3:.1f}, "
            f"correlation of anchors with objects {correlation}"
        ),
        f"exit levels: {_levels(anchors.exit_levels)}",
        *(f"  {kind}: {_levels(levels)}" for kind, levels in anchors.exit_levels_of_kind.items()),
    ]
    if evaluation.crowdhuman is not None:
        people = evaluation.crowdhuman
        lines.append(
            f"CrowdHuman: AP {_percent(people.ap)}, mMR {_percent(people.mmr)}, "
            f"recall {_percent(people.recall)}"
        )
    return "\n".join(lines)


def check_report(output_dir: Path | None) -> None:
    """Raise OutputError or ConfigError now if `write_report` could not write in the end, or would replace
    what it has not written (None: is not to write)."""
    if output_dir is not None:
        files = (_FIGURES, _DETECTIONS, *PLOTS)
        check_own_folder(output_dir, files, is_json_with("name", "coco"), "an evaluation")
        check_writable(output_dir)
        check_plots()


def write_report(evaluation: Evaluation, output_dir: Path, *, name: str) -> list[Path]:
    """Write `evaluation.json`, `detections.json` (COCO results) and the plots, and return their paths.

    `name` says what was evaluated.  Raises OutputError if a file cannot be written, ConfigError if the plots'
    library is missing.
    """
    files = {
        output_dir / _FIGURES: {"name": name, **evaluation.to_dict()},
        output_dir / _DETECTIONS: evaluation.results,
    }
    for path, content in files.items():
        atomic_write_text(path, json.dumps(content, allow_nan=False, indent=1))
    return [*files, *write_plots(evaluation, output_dir, name=name)]


def _block(coco: CocoMetrics, names: Mapping[str, str]) -> list[str]:
    """Return titles over figures; `names` are the attributes of `coco` by title."""
    return [
        "".join(f"{title:>{_WIDTH}}" for title in names),
        "".join(f"{_percent(getattr(coco, name)):>{_WIDTH}}" for name in names.values()),
    ]


def _class_lines(values: Mapping[str, float | None]) -> list[str]:
    """Return the AP of each class, if they are few."""
    if not 1 < len(values) <= _MOST_CLASSES:
        return []
    return ["AP by class: " + ", ".join(f"{name} {_percent(value)}" for name, value in values.items())]


def _recall_line(what: str, values: Mapping[int, float | None]) -> str:
    return f"AR of {what}: " + ", ".join(f"{_percent(value)} at {limit}" for limit, value in values.items())


def _levels(counts: Mapping[str, int]) -> str:
    total = max(sum(counts.values()), 1)
    return ", ".join(f"{level} {count} ({count / total:.0%})" for level, count in counts.items())


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
