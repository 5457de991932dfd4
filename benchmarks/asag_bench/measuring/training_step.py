"""What an update of a training run costs, and what of it the data, the losses and the rest take.

    python -m asag_bench.measuring.training_step [--updates 10] [--device cpu] [--output FILE.json]

Trains the published ASAG-A with ResNet-50 on generated scenes, 2 images of 640 x 640 pixels an update, with 2
processes that read and augment images.  Weights are random and probing is on from the first update, so that
there are more anchors and patches than a trained network has; how many, the result says.  Losses include
matching; data is what the training waited for.  `loader_ms_per_batch` is how fast batches come when nobody
trains: above the time of an update, they would hold it up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from asag_bench.measuring.machine import describe_machine
from asag_deploy.atomic import atomic_write
from asag_deploy.command_line import OneSentenceParser, exit_code
from asag_deploy.errors import ConfigError
from asag_evaluation.data.coco import TRAIN_SPLIT, CocoDataset
from asag_evaluation.data.scenes import write_scenes
from asag_training.data.loading import TrainingLoader
from asag_training.network.model import Asag
from asag_training.recipes import Recipe, recipe
from asag_training.run.process import Process, joined
from asag_training.run.trainer import Trainer

PROGRAM = "training_step"
PHASES = ("data", "forward", "losses", "backward", "optimizer")
_COUNTED = ("avg_anchor", "avg_patch", "avg_patch_P4", "avg_patch_P3")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns 0, or 2 with the reason in one sentence on stderr."""
    return exit_code(PROGRAM, lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", default="asag-a-r50-100-1x", metavar="NAME", help="default: %(default)s")
    add("--set", dest="changes", action="append", default=[], metavar="PART.NAME=VALUE")
    add("--batch", type=int, default=2, metavar="N", help="images an update (default: %(default)s)")
    add("--side", type=int, default=640, metavar="PIXELS", help="of the images (default: %(default)s)")
    add("--updates", type=int, default=10, metavar="N", help="that count (default: %(default)s)")
    add("--warm-up", type=int, default=2, metavar="N", help="that do not (default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="processes that read images (default: 2)")
    add("--threads", type=int, default=2, metavar="N", help="of PyTorch on the CPU (default: %(default)s)")
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the result here too")
    return parser


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    for name, least in (("batch", 1), ("side", 32), ("updates", 1), ("warm_up", 0), ("workers", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}")
    if options.threads < 1:
        raise ConfigError("--threads must be at least 1")
    chosen = recipe(options.recipe, [*_settings(options), *options.changes])
    torch.set_num_threads(options.threads)
    with joined(options.device) as process:
        measured = measure(
            chosen,
            updates=options.updates,
            warm_up=options.warm_up,
            workers=options.workers,
            process=process,
        )
    result = {
        "command": f"python -m asag_bench.measuring.training_step {' '.join(arguments)}".rstrip(),
        **measured,
    }
    text = json.dumps(result, indent=2)
    if options.output is not None:
        with atomic_write(options.output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _settings(options: argparse.Namespace) -> list[str]:
    """Images of one size, and the probing of a network that has left its first epoch behind."""
    return [
        f"optimisation.batch_size={options.batch}",
        f"augmentation.shorter_sides=[{options.side}]",
        f"augmentation.longer_side={options.side}",
        "patches.target_patch_epochs=0",
    ]


def measure(chosen: Recipe, *, updates: int, warm_up: int, workers: int, process: Process) -> dict[str, Any]:
    """Times of so many updates after so many more that do not count, as plain JSON values."""
    device = process.device
    optimisation, side = chosen.optimisation, chosen.augmentation.longer_side
    with TemporaryDirectory(prefix="asag-training-step-") as temporary:
        folder = Path(temporary)
        images = optimisation.batch_size * (updates + warm_up)
        write_scenes(folder, count=images, seed=0, size=side, split=TRAIN_SPLIT)
        dataset = CocoDataset.open(folder, TRAIN_SPLIT).for_training()
        loader = TrainingLoader(
            dataset,
            chosen.augmentation,
            batch_size=optimisation.batch_size // optimisation.accumulate,
            seed=0,
            preprocessing=chosen.preprocessing,
            workers=workers,
            pin_memory=device.type == "cuda",
        )
        loader_ms = _loader_alone(loader)
        rows = _train(chosen, dataset, loader, folder, process)[warm_up:]
        objects = mean(len(record.boxes) for record in dataset.records)
    if not rows:
        raise ConfigError("too few images were left for an update: give more --updates")
    return {
        "machine": describe_machine() | _gpu(device),
        "network": chosen.network.variant,
        "input": f"{optimisation.batch_size}x3x{side}x{side}, generated scenes of {objects:.1f} objects",
        "compute": optimisation.compute,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "workers": workers,
        "updates": len(rows),
        **_summary(rows),
        "loss": [round(row["loss"], 4) for row in rows],
        "loader_ms_per_batch": loader_ms,
    }


def _train(
    chosen: Recipe, dataset: CocoDataset, loader: TrainingLoader, folder: Path, process: Process
) -> list[Mapping[str, float]]:
    """What every update of an epoch logs."""
    torch.manual_seed(0)
    network = chosen.network.with_changes(num_classes=len(dataset.categories))
    trainer = Trainer(
        dataclasses.replace(chosen, network=network),
        Asag(network),
        dataset.categories,
        folder,
        seed=0,
        process=process,
    )
    rows: list[Mapping[str, float]] = []
    with tqdm(
        total=trainer.updates_per_epoch(loader), unit="update", file=sys.stderr, disable=None, leave=False
    ) as bar:

        def on_step(row: Mapping[str, float]) -> None:
            rows.append(row)
            bar.update()

        trainer.train_epoch(loader, on_step)
    return rows


def _loader_alone(loader: TrainingLoader) -> float:
    """Mean milliseconds a batch takes, once the reading processes have begun."""
    times = []
    begin = time.perf_counter()
    for _ in loader.epoch(0):
        times.append((time.perf_counter() - begin) * 1000)
        begin = time.perf_counter()
    return round(mean(times[1:] or times), 1)


def _summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Spread of the times by phase, and each phase's share of its own update."""
    times = {name: [row[f"ms_{name}"] for row in rows] for name in PHASES}
    whole = [sum(row[f"ms_{name}"] for name in PHASES) for row in rows]
    return {
        "per_image": {name: round(mean(row[name] for row in rows), 1) for name in _COUNTED},
        "update_ms": _spread(whole),
        "ms": {name: _spread(values) for name, values in times.items()},
        "share_of_update": {
            name: round(median(t / w for t, w in zip(values, whole, strict=True)), 4)
            for name, values in times.items()
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(median(values), 1),
        "min": round(min(values), 1),
        "p90": round(float(np.percentile(values, 90)), 1),
        "max": round(max(values), 1),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


if __name__ == "__main__":
    sys.exit(main())
