"""What an update of a training run costs, and what of it the data, the losses and the rest take.

Trains the published ASAG-A with ResNet-50 on generated scenes, 2 images of 640 x 640 pixels an update, with 2
processes that read and augment images.  Weights are random and probing is on from the first update, so that
there are more anchors and patches than a trained network has; how many, the result says.  Losses include
matching; data is what the training waited for.  `loader_ms_per_batch` is how fast batches come when nobody
trains: above the time of an update, they would hold it up.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from asag_bench.measuring.machine import describe_machine
from asag_bench.result import to_json
from asag_deploy.command_line import progress
from asag_deploy.errors import ConfigError
from asag_deploy.scratch import scratch_folder
from asag_evaluation.data.coco import TRAIN_SPLIT, CocoDataset
from asag_evaluation.data.scenes import write_scenes
from asag_training.data.loading import TrainingLoader
from asag_training.network.model import Asag
from asag_training.recipes import Recipe, recipe
from asag_training.run.gradient_scaling import compute_on
from asag_training.run.process import Process, joined
from asag_training.run.trainer import Trainer

PHASES = ("data", "forward", "losses", "backward", "optimizer")
_COUNTED = ("avg_anchor", "avg_patch", "avg_patch_P4", "avg_patch_P3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStepPlan:
    """What to measure.  Raises ConfigError when it makes no sense."""

    recipe: str = "asag-a-r50-100-1x"
    changes: tuple[str, ...] = ()
    """Settings, such as `optimisation.compute=bf16`."""
    batch: int = 2
    side: int = 640
    """Of the images, in pixels."""
    updates: int = 10
    """That count."""
    warm_up: int = 2
    """Updates before, that do not count."""
    workers: int = 2
    """Processes that read images."""
    threads: int = 2
    """Of PyTorch on the CPU."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {"batch": 1, "side": 32, "updates": 1, "warm_up": 0, "workers": 0, "threads": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {value}")

    def settings(self) -> list[str]:
        """Return the changes of the recipe: images of one size, and probing as after the first epoch."""
        return [
            f"optimisation.batch_size={self.batch}",
            f"augmentation.shorter_sides=[{self.side}]",
            f"augmentation.longer_side={self.side}",
            "patches.target_patch_epochs=0",
            *self.changes,
        ]


def measure(plan: TrainingStepPlan) -> dict[str, Any]:
    """Time the updates of a training run; returns plain JSON values."""
    chosen = recipe(plan.recipe, plan.settings())
    torch.set_num_threads(plan.threads)
    with joined(plan.device) as process:
        return _measure(chosen, plan, process)


def _measure(chosen: Recipe, plan: TrainingStepPlan, process: Process) -> dict[str, Any]:
    device = process.device
    optimisation, side = chosen.optimisation, chosen.augmentation.longer_side
    with scratch_folder() as folder:
        images = optimisation.batch_size * (plan.updates + plan.warm_up)
        write_scenes(folder, count=images, seed=0, size=side, split=TRAIN_SPLIT)
        dataset = CocoDataset.open(folder, TRAIN_SPLIT).for_training()
        loader = TrainingLoader(
            dataset,
            chosen.augmentation,
            batch_size=optimisation.batch_size // optimisation.accumulate,
            seed=0,
            preprocessing=chosen.preprocessing,
            workers=plan.workers,
            pin_memory=device.type == "cuda",
        )
        loader_ms = _loader_alone(loader)
        rows = _train(chosen, dataset, loader, folder, process)[plan.warm_up :]
        objects = mean(len(record.boxes) for record in dataset.records)
    if not rows:
        raise ConfigError("too few images were left for an update: give more --updates")
    return {
        "machine": to_json(describe_machine()) | _gpu(device),
        "network": chosen.network.variant,
        "input": f"{optimisation.batch_size}x3x{side}x{side}, generated scenes of {objects:.1f} objects",
        "compute": compute_on(device, optimisation.compute),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "workers": plan.workers,
        "updates": len(rows),
        **_summary(rows),
        "loss": [round(row["loss"], 4) for row in rows],
        "loader_ms_per_batch": loader_ms,
    }


def _train(
    chosen: Recipe, dataset: CocoDataset, loader: TrainingLoader, folder: Path, process: Process
) -> list[Mapping[str, float]]:
    """Train an epoch; return what every update logs."""
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
    with progress(total=trainer.updates_per_epoch(loader), unit="update") as bar:

        def on_step(row: Mapping[str, float]) -> None:
            rows.append(row)
            bar.update()

        trainer.train_epoch(loader, on_step)
    return rows


def _loader_alone(loader: TrainingLoader) -> float:
    """Return the mean milliseconds a batch takes, once the reading processes have begun."""
    times = []
    begin = time.perf_counter()
    for _ in loader.epoch(0):
        times.append((time.perf_counter() - begin) * 1000)
        begin = time.perf_counter()
    return round(mean(times[1:] or times), 1)


def _summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the spread of the times by phase, and each phase's share of its own update."""
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
