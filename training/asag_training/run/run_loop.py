"""A whole run: epochs, evaluations, what is written when, and what is shown meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from asag_deploy.command_line import progress
from asag_deploy.errors import DataError, TrainingError
from asag_evaluation.data.coco import CocoDataset
from asag_evaluation.evaluate import Evaluation, evaluate
from asag_training.data.loading import TrainingLoader
from asag_training.evaluation.checkpoint_predictor import network_predictor
from asag_training.run.log import RunLog
from asag_training.run.process import wait_for_all
from asag_training.run.progress_pictures import write_progress_pictures
from asag_training.run.trainer import Trainer

PICTURES = "pictures"


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """Intervals of what is done besides training; each number is 1 or more but `pictures`, 0 or more."""

    save_every: int = 1
    """Epochs."""
    save_minutes: float = 15.0
    """Minutes, within an epoch."""
    evaluate_every: int = 1
    """Epochs; after the last it is done in any case."""
    pictures: int = 4
    """Images drawn at every evaluation."""


class TrainingRun:
    """Trains to the end of the schedule, in all processes; the main one evaluates and writes."""

    def __init__(
        self, trainer: Trainer, loader: TrainingLoader, validation: CocoDataset, rhythm: Rhythm
    ) -> None:
        self.trainer, self.loader, self.validation, self.rhythm = trainer, loader, validation, rhythm
        self._main = trainer.process.is_main
        self._log: RunLog | None = None
        self._bar: Any = None
        self._saved = time.monotonic()

    def __call__(self) -> None:
        """Go on from where the trainer is.

        Raises what `Trainer.train_epoch` raises, TrainingError for memory that runs out too and for another
        process that has ended, and KeyboardInterrupt when interrupted.  All updates that were done have been
        saved then, unless one is not finite or a file could not be written.
        """
        position = self.trainer.position
        folder = self.trainer.output_dir
        with (
            RunLog(folder, step=position.step, epoch=position.evaluated)
            if self._main
            else nullcontext() as self._log,
            progress(
                total=self.trainer.recipe.schedule.epochs * self.trainer.updates_per_epoch(self.loader),
                done=position.step,
                unit="update",
                quiet=not self._main,
            ) as self._bar,
        ):
            try:
                self._train_explained()
            except KeyboardInterrupt:
                self._save_interrupted()
                raise

    def _train_explained(self) -> None:
        try:
            self._train()
        except DataError:
            self._save_interrupted()
            raise
        except RuntimeError as error:
            # A worker or another process may have got the signal as well, and is missed here.
            if self.trainer.interruption.take():
                raise KeyboardInterrupt from error
            if self.trainer.process.world_size > 1 and _has_lost_another(error):
                self._save_interrupted()
                raise TrainingError(
                    "another process of the run has ended, and said why if it could; start all of them again "
                    "with --resume, which goes on from here"
                ) from error
            explained = _explained(error)
            if explained is None:
                raise
            self._save_interrupted()
            raise explained from error

    def _train(self) -> None:
        epochs = self.trainer.recipe.schedule.epochs
        while True:
            self._between_epochs()
            if self.trainer.position.epoch >= epochs:
                return
            self.trainer.train_epoch(self.loader, self._on_step)

    def _on_step(self, values: Mapping[str, float]) -> None:
        if self._log is None:
            return
        self._log.step(self.trainer.position.step, values)
        self._bar.set_postfix_str(
            f"epoch {int(values['epoch'])}, loss {values['loss']:.2f}, "
            f"{values['avg_anchor']:.0f} anchors and {values['avg_patch']:.1f} patches an image"
        )
        self._bar.update()
        if time.monotonic() - self._saved > self.rhythm.save_minutes * 60:
            self._save()

    def _between_epochs(self) -> None:
        """Evaluate and save, if it is time; every process comes to the same result."""
        position, rhythm = self.trainer.position, self.rhythm
        epoch, last = position.epoch, position.epoch >= self.trainer.recipe.schedule.epochs
        if position.update or epoch <= position.evaluated:
            return
        due = last or epoch % rhythm.evaluate_every == 0
        if due or epoch % rhythm.save_every == 0:
            self._save()
        if due:
            self._evaluate()
            wait_for_all()

    def _evaluate(self) -> None:
        """Measure the network on the validation images, in the main process; the others learn nothing."""
        trainer = self.trainer
        if self._log is None:
            trainer.save_evaluated(None)
            return
        try:
            result = self._measure()
        finally:
            trainer.model.train()
        values = summary(result)
        epoch, step = trainer.position.epoch, trainer.position.step
        with trainer.interruption.held_back():
            self._log.evaluation(epoch, step, values)
            trainer.save_evaluated(values.get("AP"))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        self._bar.write(f"after epoch {epoch}: {shown}", file=sys.stderr)

    def _measure(self) -> Evaluation:
        trainer, total = self.trainer, len(self.validation)
        predictor = network_predictor(
            trainer.model,
            trainer.categories,
            preprocessing=trainer.recipe.preprocessing,
            device=trainer.process.device,
        )
        seen: list[int] = []

        def on_image(sample: Any, found: Any) -> None:
            seen.append(sample.image_id)
            self._bar.set_postfix_str(f"evaluating, {len(seen)} of {total} images")

        result = evaluate(predictor.detector, self.validation, on_image=on_image)
        pictures = range(min(self.rhythm.pictures, total))
        folder = trainer.output_dir / PICTURES
        write_progress_pictures(predictor.detector, self.validation, pictures, folder, trainer.position.epoch)
        return result

    def _save(self) -> None:
        self.trainer.save()
        self._saved = time.monotonic()

    def _save_interrupted(self) -> None:
        with self.trainer.interruption.ignored():
            if self.trainer.position.step:
                self.trainer.save()


def summary(result: Evaluation) -> dict[str, float]:
    """Return the few numbers to watch; those that could not be measured are left out.

    `AP` and its parts, and `anchor_AR...` (average recall of so many anchors), from 0 to 1; `anchors`,
    `patches_P4` and `patches_P3` per image; and `exit_P5`, `exit_P4` and `exit_P3`: the
    shares of images that went no deeper.
    """
    coco, anchors = result.coco, result.anchors
    numbers: dict[str, float | None] = {
        "AP": coco.ap,
        "AP50": coco.ap50,
        "AP75": coco.ap75,
        "AP_small": coco.ap_small,
        "AP_medium": coco.ap_medium,
        "AP_large": coco.ap_large,
        **{f"anchor_AR{limit}": recall for limit, recall in result.anchor_recall.items()},
        "anchors": anchors.anchors,
        "patches_P4": anchors.patches_p4,
        "patches_P3": anchors.patches_p3,
        **{f"exit_{level}": count / result.images for level, count in anchors.exit_levels.items()},
    }
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _has_lost_another(error: RuntimeError) -> bool:
    """Return whether this is what PyTorch makes of a process that does not answer any more."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


_LOST_WORKER = ("DataLoader worker", "Too many open files", "items of ancdata")
"""What PyTorch and Python say where a batch does not arrive."""


def _explained(error: RuntimeError) -> TrainingError | None:
    """Say what a user can do about it; None if nothing."""
    if isinstance(error, torch.OutOfMemoryError):
        return TrainingError(
            "the GPU's memory ran out: raise optimisation.accumulate, or use smaller images; "
            "--resume goes on from what was saved"
        )
    if any(words in str(error) for words in _LOST_WORKER):
        return TrainingError(
            "a process that reads images has died, as it does when memory, shared memory or open files run "
            "out: use fewer --workers (0 needs none of it), or allow more (a container's --shm-size, "
            "`ulimit -n`); "
            "--resume goes on from what was saved"
        )
    return None
