"""How a peer is trained: as `asag-train` trains, so that what differs is the network.

The same images, in the same order and augmented in the same way, the same optimiser, and the same form of
schedule.  What happens in an update depends on recipe, seed and the update's number alone, so that a run that
was stopped goes on as if it had not been.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from asag_bench.light_peers.detr import cells_of, check_cells
from asag_bench.light_peers.peer import (
    RECIPE,
    WEIGHTS,
    Said,
    build,
    losses_of,
    save_weights,
)
from asag_bench.light_peers.recipe import PeerRecipe
from asag_deploy.atomic import atomic_write_text
from asag_deploy.command_line import progress
from asag_deploy.errors import ConfigError, TrainingError
from asag_deploy.interruption import held_back
from asag_deploy.processing.preprocess import resized_shape
from asag_deploy.typed_json import read_fields
from asag_evaluation.data.coco import CocoDataset
from asag_training.data.loading import Batch, TrainingLoader
from asag_training.run.log import STEPS, CsvLog
from asag_training.run.optimizer import clip_gradients, set_learning_rate
from asag_training.run.process import keep_freed_memory
from asag_training.run.state import (
    STATE,
    Position,
    data_in_words,
    flat,
    is_of_asag_train,
    is_of_train_peer,
    reading_state,
    write_state,
)

_SAVE_S = 300.0
_MADE = (STEPS, WEIGHTS)


class PeerTraining:
    """A peer, its optimiser, and how far they have come."""

    def __init__(self, said: Said, data: CocoDataset, output_dir: Path, orientation: str = "auto") -> None:
        """Train on `data`; `output_dir` must exist.

        Takes up the run in it, if there is one: raises TrainingError or ConfigError if that was another run.
        """
        _check_folder(output_dir, said)
        recipe = said.recipe
        self.said, self.output_dir = said, output_dir
        self.network = build(recipe, said.seed).train()
        named = {"name": "network", "params": list(self.network.parameters()), "base_lr": recipe.lr}
        self.optimizer = torch.optim.AdamW(
            [named], lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        self.loader = TrainingLoader(
            data,
            recipe.augmentation,
            batch_size=recipe.batch_size,
            seed=said.seed,
            preprocessing=recipe.preprocessing,
            workers=0,
        )
        self.position = Position()
        self._data = data_in_words(data, orientation)
        self._saved = time.monotonic()
        if (output_dir / STATE).exists():
            self._resume()
        atomic_write_text(output_dir / RECIPE, said.to_json())  # also where it was lost
        self._log = CsvLog(output_dir / STEPS)
        self._log.keep_up_to("step", self.position.step)

    def __call__(self, *, quiet: bool = False) -> None:
        """Train to the end of the schedule.

        Raises TrainingError for a loss or gradient that is not finite, DataError for an image that cannot be
        read, and KeyboardInterrupt when interrupted; the updates that were done have been saved then.
        """
        keep_freed_memory()
        epochs, per_epoch = self.said.recipe.schedule.epochs, self.loader.batches_per_epoch
        with progress(total=epochs * per_epoch, done=self.position.step, unit="update", quiet=quiet) as bar:
            try:
                while self.position.epoch < epochs:
                    began = time.process_time()
                    for batch in self.loader.epoch(self.position.epoch, self.position.update):
                        with held_back():
                            values = self._update(batch, began)
                        bar.set_postfix_str(f"epoch {self.position.epoch}, loss {values['loss']:.2f}")
                        bar.update()
                        began = time.process_time()
                    self.position = replace(self.position, epoch=self.position.epoch + 1, update=0)
                    self.save()
            except KeyboardInterrupt:
                self.save()
                raise

    def save(self) -> None:
        """Write `state.pt`, to go on from, and the weights.  Raises OutputError if that fails."""
        parts = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        with held_back():
            write_state(self.output_dir, self._identity(), self.position, parts)
            save_weights(self.network, self.output_dir)
        self._saved = time.monotonic()

    def _update(self, batch: Batch, began: float) -> Mapping[str, float]:
        """Make one update; return what was logged of it."""
        step, recipe = self.position.step, self.said.recipe
        torch.manual_seed((self.said.seed + 1) * 1_000_003 + step)
        losses = losses_of(self.network, batch)
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        rates = set_learning_rate(self.optimizer, recipe.schedule.factor(self.position.epoch, step))
        norm = clip_gradients(self.network.parameters(), recipe.max_gradient_norm)
        if not torch.isfinite(total + norm):
            images = ", ".join(map(str, batch.image_ids))
            raise TrainingError(
                f"the loss or a gradient is not finite in update {step + 1}, of images {images}: lower lr"
            )
        self.optimizer.step()
        self.position = replace(self.position, update=self.position.update + 1, step=step + 1)
        values = {
            "epoch": float(self.position.epoch),
            "loss": total.item(),
            **{name: loss.item() for name, loss in losses.items()},
            "gradient_norm": norm.item(),
            "lr": rates["network"],
            "ms_cpu": 1000 * (time.process_time() - began),
        }
        self._log.add({"step": step + 1, **values})
        if time.monotonic() - self._saved > _SAVE_S:
            self.save()
        return values

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a run to go on."""
        said = self.said
        classes = [[category.id, category.name] for category in said.categories]
        return {
            **flat(said.recipe.to_dict()),
            "seed": said.seed,
            "training data": self._data,
            "classes": classes,
        }

    def _resume(self) -> None:
        with reading_state(self.output_dir, self._identity(), {}, torch.device("cpu")) as state:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.position = cast(Position, read_fields(Position, state["position"]))


def check_queries(recipe: PeerRecipe, data: CocoDataset) -> None:
    """Raise ConfigError if some picture is too small for as many queries as the peer has.

    Whatever batch it comes in is at least as large, unless the others are no larger.
    """
    if recipe.peer != "d-fine-lite":
        return
    of, side = recipe.augmentation, recipe.preprocessing.size_divisor
    spec = replace(recipe.preprocessing, shorter_side=min(of.shorter_sides), longer_side=of.longer_side)
    canvases = set()
    for shape in {(record.height, record.width) for record in data.records}:
        height, width = (-(-each // side) * side for each in resized_shape(*shape, spec))
        canvases.add((height, width))
    check_cells(recipe.queries, min(canvases, key=cells_of, default=(side, side)))


def _check_folder(folder: Path, said: Said) -> None:
    """Raise ConfigError if a folder holds what this run would replace, but has not written.

    A recipe that came to no update is nobody's.  What `state.pt` is of, it tells itself.
    """
    recipe = folder / RECIPE
    there: object = None
    try:
        there = json.loads(recipe.read_bytes())
    except FileNotFoundError:
        made = () if (folder / STATE).exists() else _MADE
        foreign = next((name for name in made if (folder / name).exists()), None)
    except (OSError, ValueError, RecursionError):
        foreign = RECIPE
    else:
        foreign = None if is_of_train_peer(there) or is_of_asag_train(there) else RECIPE
    if foreign is not None:
        raise ConfigError(f"'{folder}' holds a '{foreign}' that no run has written: give another folder")
    if is_of_asag_train(there):
        raise ConfigError(f"'{folder}' holds a run of asag-train: give another folder")
    if there is None or (folder / STATE).exists() or there == json.loads(said.to_json()):
        return
    if (folder / WEIGHTS).exists() or _has_rows(folder / STEPS):
        raise ConfigError(f"'{folder}' holds the recipe of another run: give another folder")


def _has_rows(table: Path) -> bool:
    """Return whether a table has more than its header."""
    try:
        with table.open("rb") as file:
            return len(list(itertools.islice(file, 2))) > 1
    except FileNotFoundError:
        return False
