"""How right what is timed is: its AP on annotated pictures, and whether each backend finds the same.

A bundle's parity report says that its graphs compute what PyTorch does in ONNX Runtime on the CPU.  Of
another backend, or of a quantised bundle, it says nothing: that is seen here, on the pictures that are timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from asag_bench.measuring.image_groups import Picture, Samples, evenly
from asag_bench.measuring.plan import BundleOnBackend, Plan
from asag_bench.result import Accuracy, Agreement, RunnerAgreement
from asag_bench.runners.references import rule_of
from asag_bench.runners.runner import DetectorRunner
from asag_deploy.backends import DEFAULT_BACKEND, open_network
from asag_deploy.command_line import progress
from asag_deploy.detections import Detections
from asag_deploy.images.reading import RgbImage
from asag_export.gate.parity import LEAST_IN_COMMON, Found, in_common

NEEDS = "accuracy was not measured: it needs {name}, which `pip install 'asag-deploy[bench]'` installs"


def open_data(plan: Plan, runner: DetectorRunner) -> tuple[Any | None, str | None]:
    """Open the validation images of the data set that a plan names; or None, and why they cannot be measured.

    Raises DataError if the folder is no data set, or one of other classes.
    """
    assert plan.data is not None
    try:
        import faster_coco_eval  # noqa: F401

        from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset
    except ImportError as error:
        return None, NEEDS.format(name=error.name)
    categories = runner.detector().manifest.categories
    data = CocoDataset.open(plan.data, VAL_SPLIT, categories=categories, orientation=plan.orientation)
    return data.first(plan.limit), None


def pictures_of(data: Any, most: int) -> list[tuple[str, RgbImage]]:
    """Read at most so many pictures of a data set, evenly from first to last, with their names."""
    return [(str(data.records[i].image_id), data[i].image) for i in evenly(len(data), most)]


def measure_accuracy(runner: DetectorRunner, data: Any, *, quiet: bool) -> Accuracy:
    """Evaluate a runner on a data set opened by `open_data`, one image at a time."""
    from asag_evaluation.evaluate import evaluate

    label = f"accuracy of {runner.name}"
    with progress(total=len(data), unit="image", description=label, quiet=quiet) as bar:
        found = evaluate(runner.detector(), data, on_image=lambda sample, detections: bar.update())
    return Accuracy(images=found.images, ap=found.coco.ap, ap50=found.coco.ap50, ap75=found.coco.ap75)


def measure_agreement(
    plan: Plan, chosen: Sequence[BundleOnBackend], runners: Sequence[DetectorRunner], samples: Samples
) -> Agreement:
    """Compare every detector's finds on the pictures that are timed with those of ONNX Runtime on the CPU.

    There the first float32 bundle is run, or the first if none is.
    """
    bundles = [each.bundle for each in chosen]
    bundle = next((b for b in bundles if b.manifest.precision == "fp32"), bundles[0])
    network = open_network(DEFAULT_BACKEND, bundle, plan.options.threads)
    rule = rule_of(bundle.manifest, plan.options.detector())
    checked = DetectorRunner(DEFAULT_BACKEND, bundle.manifest, network, rule)
    pictures = list(
        {picture.name: picture for group in samples.groups for picture in group.pictures}.values()
    )
    expected = _detect(checked, pictures)
    return Agreement(
        compared_with=f"{DEFAULT_BACKEND} {bundle.manifest.precision}",
        least_in_float32=LEAST_IN_COMMON,
        runners={runner.name: _compare(expected, _detect(runner, pictures)) for runner in runners},
    )


def _detect(runner: DetectorRunner, pictures: Sequence[Picture]) -> list[Detections]:
    detector = runner.detector()
    return [detector(picture.image, channel_order="rgb") for picture in pictures]


def _found(detections: Detections) -> Found:
    return Found(scores=detections.confidence, classes=detections.class_id, boxes=detections.xyxy)


def _compare(expected: Sequence[Detections], found: Sequence[Detections]) -> RunnerAgreement:
    pairs = list(zip(expected, found, strict=True))
    return RunnerAgreement(
        pictures=len(pairs),
        same_stops=sum(one.trace.exit_level == other.trace.exit_level for one, other in pairs),
        detections=float(np.mean([in_common(_found(one), _found(other)) for one, other in pairs])),
    )
