"""Photographs: blood cells, through the network that was trained on others of their kind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from asag_deploy import Bundle, Detector
from asag_deploy.examples import PHOTOGRAPHS, PHOTOGRAPHS_SPLIT
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.metrics.hits import Compared, count_hits
from asag_export.demo.exporting import export
from asag_export.demo.networks import PHOTOGRAPHS_CHECKPOINT
from asag_export.demo.pictures import PHOTOGRAPHS_GALLERY, write_gallery

_SHOWN = 3
"""Photographs in the gallery: the first ones, which stop at different levels."""
_THRESHOLD = 0.5


def show_photographs(output_dir: Path) -> None:
    """Export the network, detect in the photographs that come with the project, and print what was found."""
    bundle = export("1.", PHOTOGRAPHS_CHECKPOINT, output_dir / "photographs", in_full=False)
    photographs = CocoDataset.open(PHOTOGRAPHS, PHOTOGRAPHS_SPLIT)
    print(
        f"\n2. Detecting in {len(photographs)} photographs that the network has never seen, with ONNX "
        "Runtime on the CPU, without PyTorch"
    )
    _detect(bundle, photographs)
    with Detector.load(bundle) as detector:
        shown = [photographs[i].image for i in range(min(_SHOWN, len(photographs)))]
        write_gallery(output_dir / PHOTOGRAPHS_GALLERY, detector, shown, enlarged=1.0)


def _detect(bundle: Bundle, photographs: CocoDataset) -> None:
    print(f"   {'photograph':<24} {'stopped at':<10} {'patches':>7} {'anchors':>7} {'ms':>6}   found")
    compared = []
    with Detector.load(bundle) as detector:
        for number, record in enumerate(photographs.records):
            sample = photographs[number]
            found = detector(sample.image, channel_order="rgb", threshold=_THRESHOLD)
            compared.append(Compared(found.xyxy, found.class_id, sample.boxes, sample.labels))
            trace = found.trace
            patches = sum(level.patches for level in trace.levels[1:])
            counts = Counter(found.names)
            cells = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
            print(
                f"   {record.file_name:<24} {trace.exit_level:<10} {patches:>7} {trace.anchor_count:>7} "
                f"{found.times_ms['total']:>6.1f}   {cells}"
            )
    hits = count_hits(compared)
    print(
        f"   {hits.hits} of {hits.objects} annotated cells are among the {hits.detections} detections of "
        f"confidence {_THRESHOLD:g}"
    )
