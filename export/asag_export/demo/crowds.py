"""More objects than the network was trained for: the cap of its anchors raised, nothing trained again."""

from __future__ import annotations

from pathlib import Path

from asag_deploy import Bundle, Detector
from asag_deploy.command_line import progress
from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset
from asag_evaluation.data.scenes import write_scenes
from asag_evaluation.metrics.hits import Compared, count_hits
from asag_export.demo.networks import CHECKPOINT, SEED, SIZE, TRAINED_FOR

CAPS = (150, 300, 600)
"""Anchors that reach the decoder; the network was trained with the first."""
MOST_ANCHORS, MOST_DETECTIONS = CAPS[-1], 600
_THRESHOLD = 0.3


def show_crowds(bundle: Bundle, output_dir: Path, count: int) -> None:
    """Print how many of the objects of crowds are found, by the cap.

    bundle: of the network for scenes, exported for `MOST_ANCHORS` and `MOST_DETECTIONS`; count: how many
    crowds are drawn, each of 60 to 200 objects.
    """
    folder = output_dir / f"crowds-{count}"
    if not (folder / VAL_SPLIT).exists():
        write_scenes(folder, count=count, seed=SEED, size=SIZE, split=VAL_SPLIT, kinds=("crowd",))
    crowds = CocoDataset.open(folder, VAL_SPLIT)
    objects = sum(len(record.boxes) for record in crowds.records) / len(crowds)
    print(
        f"\n6. More objects than it was trained for: {count} crowds of {objects:.0f} objects on average, "
        f"from {CHECKPOINT.name}, which was trained with {CAPS[0]} anchors"
    )
    print(f"   {'anchors at most':<16} {'detections at most':<19} {'recall':>6} {'precision':>9} {'ms':>6}")
    trained = TRAINED_FOR["anchor_cap"], TRAINED_FOR["max_detections"]
    ways = [trained, *((cap, MOST_DETECTIONS) for cap in CAPS)]
    with Detector.load(bundle) as detector:
        for cap, most in ways:
            recall, precision, milliseconds = _measure(detector, crowds, cap, most)
            print(f"   {cap:<16} {most:<19} {recall:>6.3f} {precision:>9.3f} {milliseconds:>6.1f}")


def _measure(detector: Detector, crowds: CocoDataset, cap: int, most: int) -> tuple[float, float, float]:
    """Return recall and precision of detections of confidence 0.3, IoU 0.5, and the mean time of a call."""
    compared, milliseconds = list[Compared](), 0.0
    with progress(total=len(crowds), unit="crowd", description=f"{cap} anchors") as bar:
        for sample in (crowds[i] for i in range(len(crowds))):
            found = detector(
                sample.image,
                channel_order="rgb",
                threshold=_THRESHOLD,
                anchor_cap=cap,
                max_detections=most,
            )
            compared.append(Compared(found.xyxy, found.class_id, sample.boxes, sample.labels))
            milliseconds += found.times_ms["total"]
            bar.update()
    hits = count_hits(compared)
    return hits.recall or 0.0, hits.precision or 0.0, milliseconds / len(crowds)
