"""`asag-eval`: measure a checkpoint or a bundle on a data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.command_line import OneSentenceParser, exit_code
from asag_deploy.errors import ConfigError
from asag_evaluation.data.coco import VAL_SPLIT, CocoDataset
from asag_evaluation.evaluate import Evaluation, evaluate
from asag_evaluation.report import table, write_report
from asag_training.evaluation.predictor import Predictor, load_predictor

PROGRAM = "asag-eval"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-eval` with these arguments (None: the command line's) and return its exit code.

    0: all fine; 2: nothing could be measured, with the reason in one sentence on stderr; 130: interrupted.
    """
    return exit_code(PROGRAM, lambda: _run(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM,
        description="Measure a checkpoint or a bundle on a data set in COCO layout.",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="BUNDLE_OR_CHECKPOINT", help="a bundle's folder, or a checkpoint's file")
    add("--data", type=Path, required=True, metavar="DIR", help="the data set's folder")
    add("--split", default=VAL_SPLIT, metavar="NAME", help=f"which part of it (default: {VAL_SPLIT})")
    add("--limit", type=int, metavar="N", help="measure on the first N images only")
    add("--output-dir", type=Path, metavar="DIR", help="write the figures, the detections and plots to DIR")
    add("--backend", metavar="B", help="what runs a bundle (default: onnxruntime), or torch for a checkpoint")
    add("--mode", choices=("exact", "fast"), help="how far to probe (default: as exported, or exact)")
    add("--max-level", choices=("P5", "P4", "P3"), help="probe no deeper than this level")
    add("--head", metavar="HEAD", help="which decoder of a checkpoint (default: main)")
    add("--shorter-side", type=int, metavar="PIXELS", help="image size for a checkpoint (default: 800)")
    add("--longer-side", type=int, metavar="PIXELS", help="its limit (default: 5/3 of the shorter side)")
    add("--device", default="cpu", metavar="D", help="where PyTorch runs a checkpoint (default: cpu)")
    add("--batch", type=int, default=1, metavar="N", help="images to run at once (default: 1)")
    add("--quiet", action="store_true", help="print no table")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit is {options.limit}; it must be at least 1")
    predictor = load_predictor(
        options.model,
        backend=options.backend,
        mode=options.mode,
        max_level=options.max_level,
        head=options.head,
        preprocessing=_preprocessing(options.shorter_side, options.longer_side),
        device=options.device,
    )
    manifest = predictor.detector.manifest
    dataset = CocoDataset.open(options.data, options.split, categories=manifest.categories)
    if options.limit is not None:
        dataset = dataset.subset(range(min(options.limit, len(dataset))))
    if not manifest.trained:
        print(f"{PROGRAM}: warning: the weights are untrained, so the figures mean nothing", file=sys.stderr)
    evaluation = _evaluate(predictor, dataset, options.batch)
    if not options.quiet:
        print(f"{predictor.name} on {options.data} {options.split}\n{table(evaluation)}")
    if options.output_dir is not None:
        write_report(evaluation, options.output_dir, name=f"{predictor.name}, {options.split}")
    return 0


def _evaluate(predictor: Predictor, dataset: CocoDataset, batch: int) -> Evaluation:
    with tqdm(total=len(dataset), unit="image", file=sys.stderr, disable=None, leave=False) as bar:
        return evaluate(
            predictor.detector,
            dataset,
            proposals=predictor.proposals,
            batch=batch,
            on_image=lambda sample, detections: bar.update(),
        )


def _preprocessing(shorter: int | None, longer: int | None) -> Preprocessing | None:
    if shorter is None and longer is None:
        return None
    shorter = Preprocessing().shorter_side if shorter is None else shorter
    longer = round(shorter * 5 / 3) if longer is None else longer
    if not 1 <= shorter <= longer:
        raise ConfigError(
            f"--shorter-side {shorter} and --longer-side {longer} are no image size: expected 1 pixel or "
            "more, and the longer side not below the shorter"
        )
    return Preprocessing(shorter_side=shorter, longer_side=longer)
