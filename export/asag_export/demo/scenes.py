"""Generated scenes that the network has never seen: exactly, in fast mode and at every manual stop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag_deploy import Bundle, Detector
from asag_deploy.command_line import progress
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.loop.stopping import stop_rule
from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset, Sample
from asag_evaluation.data.scenes import KINDS, write_scenes
from asag_export.demo.crowds import MOST_ANCHORS, MOST_DETECTIONS
from asag_export.demo.exporting import export
from asag_export.demo.networks import CHECKPOINT, SEED, SIZE, TRAINED_FOR
from asag_export.demo.pictures import SCENES_GALLERY, write_gallery

if TYPE_CHECKING:  # what it takes beyond the base install is imported once it runs
    from asag_evaluation.evaluate import Evaluation

_WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fast": {"mode": "fast"},
    "stop at P4": {"max_level": "P4"},
    "stop at P5": {"max_level": "P5"},
}
_ENLARGED = 2
"""How many times the pictures are enlarged, which are small for a screen."""


def show_scenes(output_dir: Path, count: int) -> Bundle:
    """Export the network, draw the scenes, detect in them and print the figures; returns the bundle."""
    from asag_evaluation.report import table, write_report

    limits = (f"anchor_cap={MOST_ANCHORS}", f"max_detections={MOST_DETECTIONS}")
    bundle = export("\n3.", CHECKPOINT, output_dir, limits=limits)
    print(f"\n4. Detecting in {count} generated scenes that the network has never seen", flush=True)
    dataset = _scenes(output_dir / "scenes", count)
    measured = _measure(bundle, dataset, output_dir / SCENES_GALLERY)
    _print_ways(measured)
    trained = f"--anchor-cap {TRAINED_FOR['anchor_cap']} --max-detections {TRAINED_FOR['max_detections']}"
    print(
        f"   {output_dir / 'bundle'} is exported for {MOST_ANCHORS} anchors and {MOST_DETECTIONS} "
        f"detections; {trained} give the table above"
    )
    print("\n5. In detail, exactly:\n")
    print("   " + table(measured["exact"]).replace("\n", "\n   "))
    name = f"{bundle.manifest.variant}, exact"
    write_report(measured["exact"], output_dir / "evaluation", name=name)
    return bundle


def _scenes(folder: Path, count: int) -> CocoDataset:
    """Draw the scenes, unless an earlier demo left as many."""
    if (folder / VAL_SPLIT).exists():
        drawn = CocoDataset.open(folder, VAL_SPLIT)
        if len(drawn) == count:
            return drawn
        folder = folder.with_name(f"{folder.name}-{count}")
        if (folder / VAL_SPLIT).exists():
            return CocoDataset.open(folder, VAL_SPLIT)
    with progress(total=count, unit="scene") as bar:
        write_scenes(
            folder, count=count, seed=SEED, size=SIZE, split=VAL_SPLIT, progress=lambda done: bar.update()
        )
    return CocoDataset.open(folder, VAL_SPLIT)


def _measure(bundle: Bundle, dataset: CocoDataset, gallery: Path) -> dict[str, Evaluation]:
    """Run all ways over all scenes, and write the gallery of the exact one first.

    The ways share the network and take turns, scene by scene, so that whatever else the machine does at a
    time slows all of them alike.
    """
    from asag_evaluation.evaluate import evaluate_together

    manifest = bundle.manifest
    network = DetectorOptions().open_network(bundle)
    detectors = {
        way: Detector(
            manifest,
            network,
            stop_rule(manifest, options.get("mode"), options.get("max_level")),
            **TRAINED_FOR,
        )
        for way, options in _WAYS.items()
    }
    pictures = [sample.image for sample in _first_of_each_kind(dataset)]
    write_gallery(gallery, detectors["exact"], pictures, enlarged=_ENLARGED)
    with progress(total=len(dataset) * len(detectors), unit="scene") as bar:
        measured = evaluate_together(
            [(detector, None) for detector in detectors.values()],
            dataset,
            on_image=lambda sample, found: bar.update(),
        )
    return dict(zip(detectors, measured, strict=True))


def _print_ways(measured: dict[str, Evaluation]) -> None:
    print(
        f"   {'way':<11} {'AP':>6} {'AP50':>6} {'anchors':>8} {'patches':>8} {'ms':>6}   "
        "scenes that stopped at P5, P4, P3"
    )
    for way, found in measured.items():
        anchors = found.anchors
        exits = ", ".join(f"{anchors.exit_levels.get(level, 0)}" for level in ("P5", "P4", "P3"))
        print(
            f"   {way:<11} {_percent(found.coco.ap)} {_percent(found.coco.ap50)} {anchors.anchors:>8.1f} "
            f"{anchors.patches_p4 + anchors.patches_p3:>8.1f} {found.ms_per_image:>6.1f}   {exits}"
        )


def _percent(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{100 * value:>6.1f}"


def _first_of_each_kind(dataset: CocoDataset) -> list[Sample]:
    kinds = [record.kind for record in dataset.records]
    return [dataset[kinds.index(kind)] for kind in KINDS if kind in kinds]
