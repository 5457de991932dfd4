"""The training loop.

What happens in a step depends on the recipe, the seed and the number of the step, and on nothing else: random
choices are drawn from generators that are seeded anew for every step, and images are augmented by epoch and
index.  So a run that was stopped continues as if it had not been.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from asag_deploy.atomic import atomic_write
from asag_deploy.errors import TrainingError
from asag_deploy.manifest import Category
from asag_training.checkpoints import Checkpoint, save_checkpoint
from asag_training.data.loading import Batch, TrainingLoader
from asag_training.distributed import Process, wait_for_all
from asag_training.losses import Criterion, Losses
from asag_training.model import Asag
from asag_training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from asag_training.recipes import Recipe
from asag_training.training_network import run_network

LAST, BEST, STATE = "last.safetensors", "best.safetensors", "state.pt"
BAD_BATCH = "bad-batch.pt"


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run has come."""

    epoch: int = 0
    """The epoch that is under way, or comes next."""
    update: int = 0
    """Updates done in it."""
    step: int = 0
    """Updates done in all."""
    best: float = -1.0
    """The best AP so far; -1 before the first evaluation."""


class Trainer:
    """A network, its optimiser, and how far they have come."""

    def __init__(
        self,
        recipe: Recipe,
        model: Asag,
        categories: tuple[Category, ...],
        output_dir: Path,
        *,
        seed: int,
        process: Process | None = None,
    ) -> None:
        self.recipe, self.categories, self.output_dir, self.seed = recipe, categories, output_dir, seed
        self.process = process or Process()
        self.model = model.to(self.process.device).train()
        o = recipe.optimisation
        self.optimizer = build_optimizer(
            self.model,
            lr=o.lr,
            backbone_factor=o.backbone_factor,
            weight_decay=o.weight_decay,
            freeze_stem=o.freeze_stem,
        )
        self.position = Position()
        self._step = _Step(self.model, recipe)
        self._run_step: nn.Module = self._step
        if self.process.world_size > 1:
            # Which levels and heads a batch uses depends on the images, so parameters may go unused.
            self._run_step = DistributedDataParallel(self._step, find_unused_parameters=True)

    def train_epoch(
        self, loader: TrainingLoader, on_step: Callable[[Mapping[str, float]], object] = lambda values: None
    ) -> None:
        """Train to the end of the epoch that is under way.

        `on_step` gets the losses, learning rates, statistics and times of every update.  Raises TrainingError
        if a loss is not finite; the batch that caused it is then in `bad-batch.pt`.
        """
        accumulate = self.recipe.optimisation.accumulate
        epoch = self.position.epoch
        updates = max(loader.batches_per_epoch // accumulate, 1)
        batches = loader.epoch(epoch, self.position.update * accumulate)
        for update in range(self.position.update, updates):
            on_step(self._update(batches, update, min(accumulate, loader.batches_per_epoch)))
        self.position = _moved(self.position, epoch=epoch + 1, update=0)

    def save(self, *, best: float | None = None) -> None:
        """Write `state.pt`, to resume from, and `last.safetensors`, to export.

        `best` is the AP of an evaluation: if it is the best so far, `best.safetensors` is written too.
        """
        improved = best is not None and best > self.position.best
        if improved and best is not None:
            self.position = _moved(self.position, best=best)
        if self.process.is_main:
            checkpoint = self.checkpoint()
            if improved:
                save_checkpoint(self.output_dir / BEST, checkpoint)
            save_checkpoint(self.output_dir / LAST, checkpoint)
            state = {
                "recipe": self.recipe.to_dict(),
                "seed": self.seed,
                "world_size": self.process.world_size,
                "position": dict(vars(self.position)),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            with atomic_write(self.output_dir / STATE) as temporary:
                torch.save(state, temporary)
        wait_for_all()

    def resume(self) -> bool:
        """Take up the run that `output_dir` holds; returns False if it holds none.

        Raises TrainingError if it was another run: another recipe, seed or number of processes.
        """
        path = self.output_dir / STATE
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location=self.process.device, weights_only=True)
            same = {
                "recipe": state["recipe"] == self.recipe.to_dict(),
                "seed": state["seed"] == self.seed,
                "number of processes": state["world_size"] == self.process.world_size,
            }
        except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
            raise TrainingError(
                f"cannot resume from '{path}', which is damaged ({type(error).__name__}); "
                "give another output folder, or start anew from last.safetensors with --init"
            ) from error
        other = [name for name, equal in same.items() if not equal]
        if other:
            raise TrainingError(
                f"'{self.output_dir}' holds a run with another {other[0]}; resume it with the options it was "
                "started with, or give another output folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.position = Position(**state["position"])
        return True

    def checkpoint(self) -> Checkpoint:
        """The network as it is, ready to be exported."""
        return Checkpoint(
            config=self.recipe.network,
            state={name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()},
            categories=self.categories,
            trained=True,
            epoch=max(self.position.epoch - 1, 0),
            preprocessing=self.recipe.preprocessing,
        )

    def _update(self, batches: Any, update: int, accumulate: int) -> dict[str, float]:
        """One optimiser step over `accumulate` batches; returns what there is to log."""
        clock = _Clock(self.process.device)
        rates = set_learning_rate(
            self.optimizer, self.recipe.schedule.factor(self.position.epoch, self.position.step)
        )
        self.optimizer.zero_grad(set_to_none=True)
        losses: Losses | None = None
        for part in range(accumulate):
            batch = next(batches).to(self.process.device)
            clock.lap("data")
            total, losses = self._run_step(batch, self.position.epoch, self._generator(part), clock)
            self._check(losses, batch)
            (total / accumulate).backward()
            clock.lap("backward")
        assert losses is not None
        norm = clip_gradients(self.model.parameters(), self.recipe.optimisation.max_gradient_norm)
        self.optimizer.step()
        clock.lap("optimizer")
        self.position = _moved(self.position, update=update + 1, step=self.position.step + 1)
        return {
            "epoch": float(self.position.epoch),
            **losses.to_host(),
            **{f"lr_{name}": rate for name, rate in rates.items()},
            "gradient_norm": float(norm),
            **{f"ms_{name}": value for name, value in clock.times_ms.items()},
        }

    def _generator(self, part: int) -> torch.Generator:
        """The random numbers of one pass: they depend on where the run is, not on how it got there."""
        generator = torch.Generator()
        place = (self.seed, self.position.step, part, self.process.rank)
        mixed = 0
        for number in place:
            mixed = (mixed * 1_000_003 + number + 1) % (1 << 62)
        return generator.manual_seed(mixed)

    def _check(self, losses: Losses, batch: Batch) -> None:
        if torch.isfinite(losses.total):
            return
        names = losses.not_finite() or ["the sum"]
        path = self.output_dir / BAD_BATCH
        with atomic_write(path) as temporary:
            torch.save({**batch._asdict(), "targets": [tuple(t) for t in batch.targets]}, temporary)
        raise TrainingError(
            f"the loss is not finite in step {self.position.step} ({', '.join(names)}): the batch, of images "
            f"{', '.join(map(str, batch.image_ids))}, is in '{path}'; check their boxes, or lower the rate"
        )


class _Step(nn.Module):
    """Forward pass and losses as one module, which is what DistributedDataParallel wants to wrap."""

    def __init__(self, model: Asag, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.criterion = Criterion(recipe.loss)

    def forward(
        self, batch: Batch, epoch: int, generator: torch.Generator, clock: _Clock
    ) -> tuple[Tensor, Losses]:
        """The total, which DistributedDataParallel follows back to the parameters, and all the parts."""
        output = run_network(
            self.model,
            batch.image,
            batch.image_size,
            targets=batch.targets,
            settings=self.recipe.patches,
            epoch=epoch,
            generator=generator,
            autocast=torch.bfloat16 if self.recipe.optimisation.compute == "bf16" else None,
        )
        clock.lap("forward")
        losses = self.criterion(output, batch.targets, training=True)
        clock.lap("losses")
        return losses.total, losses


class _Clock:
    """Milliseconds between laps, summed by name; waits for the GPU, whose work is asynchronous."""

    def __init__(self, device: torch.device) -> None:
        self.times_ms: dict[str, float] = {}
        self._cuda = device.type == "cuda"
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times_ms[name] = self.times_ms.get(name, 0.0) + (now - self._last) * 1000
        self._last = now


def _moved(position: Position, **changes: Any) -> Position:
    return Position(**{**vars(position), **changes})
