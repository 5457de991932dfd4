"""The training loop.

What happens in an update depends on the recipe, the seed and the number of the update, and on nothing else:
random choices are drawn from generators that are seeded anew for every pass, and images are augmented by
epoch and index.  So a run that was stopped continues as if it had not been.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import TrainingError
from asag_deploy.interruption import Interruption, current
from asag_deploy.timing import Stopwatch
from asag_deploy.typed_json import read_fields
from asag_training.checkpoints import Checkpoint, save_checkpoint
from asag_training.data.loading import Batch, TrainingLoader
from asag_training.losses.criterion import Criterion, Losses
from asag_training.network.model import Asag
from asag_training.recipes import Recipe
from asag_training.run.gradient_scaling import AUTOCAST, GradientScaling, compute_on
from asag_training.run.optimizer import build_optimizer, clip_gradients, set_learning_rate
from asag_training.run.process import Process
from asag_training.run.state import (
    BEST,
    LAST,
    STATE,
    Position,
    default_settings,
    differences,
    flat,
    reading_state,
    write_file,
    write_state,
)
from asag_training.run.training_pass import training_pass

BAD_BATCH = "bad-batch.pt"


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
        data: str | None = None,
        validation: str | None = None,
        process: Process | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        """Train `model`, which has the recipe's network and as many classes as `categories`.

        `output_dir` must exist; `data` says what it is trained on, and is the same when a run is resumed;
        `validation` what it is evaluated on: with another, the best AP begins anew;
        `interruption`, the program's if not given, is held back while an update is made or a file is written.
        """
        self.recipe, self.categories, self.output_dir, self.seed = recipe, categories, output_dir, seed
        self.process = process or Process()
        self.interruption = interruption or current()
        self.model = model.to(self.process.device).train()
        o = recipe.optimisation
        self.optimizer = build_optimizer(self.model, o)
        if o.batch_statistics:
            model.backbone[0].body.learn_statistics()  # type: ignore[union-attr, operator]
        self.scaling = GradientScaling(self.process.device, o.compute)
        self.position = Position()
        self.changed: tuple[str, ...] = ()
        """Sentences about what was otherwise where the resumed run was saved."""
        self._data, self._validation = data, validation
        self._before: dict[str, Tensor] | None = None
        self._torn = False
        self._step: nn.Module = _Step(
            self.model, recipe, AUTOCAST[compute_on(self.process.device, o.compute)]
        )
        if self.process.world_size > 1:
            # Which levels and heads a batch uses depends on the images, so parameters may go unused.  Newer
            # releases of torch warn that `broadcast_buffers` will have another name, which older ones lack.
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                self._step = DistributedDataParallel(
                    self._step, find_unused_parameters=True, broadcast_buffers=False
                )

    def updates_per_epoch(self, loader: TrainingLoader) -> int:
        """Return the updates in a whole epoch; batches that are too few for one more are left out."""
        return max(loader.batches_per_epoch // self.recipe.optimisation.accumulate, 1)

    def train_epoch(
        self, loader: TrainingLoader, on_step: Callable[[Mapping[str, float]], object] = lambda values: None
    ) -> None:
        """Train to the end of the epoch that is under way.

        `on_step` gets the losses, learning rates, statistics and times of every update: of this process's
        images, averaged over the passes.  Raises TrainingError if a loss or a gradient is not finite; the
        batch that caused it is then in `bad-batch.pt`.  (With float16, gradients that may only have been
        scaled too much cost an update instead.)  Raises DataError if an image cannot be read.
        """
        self._roll_back()
        start, accumulate = self.position, self.recipe.optimisation.accumulate
        passes = min(accumulate, loader.batches_per_epoch)
        batches = loader.epoch(start.epoch, start.update * accumulate)
        with _repeatable(self.process.device):
            for _ in range(start.update, self.updates_per_epoch(loader)):
                clock, cpu = _Clock(self.process.device), time.process_time()
                self._begin_update()
                values, batch = self._add_gradients(batches, passes, clock)
                with self.interruption.held_back():
                    self.scaling.unscale(self.optimizer)
                    self._check_gradients(batch)
                    values |= self._update(clock) | {"ms_cpu": 1000 * (time.process_time() - cpu)}
                    on_step(values)
        self.position = replace(self.position, epoch=start.epoch + 1, update=0)

    def save(self) -> None:
        """Write `state.pt`, to resume from, and `last.safetensors`, to export, in the main process.

        What is written is the run after its last whole update: one that was broken off leaves no trace.  One
        that broke off while it changed the weights cannot be undone, and then nothing is written.

        Raises OutputError if that fails; what was there before is then still whole.
        """
        if not self.process.is_main:
            return
        with self.interruption.held_back():
            self._roll_back()
            if self._torn:
                return
            parts = {name: part.state_dict() for name, part in self._parts().items()}
            # First, so that a run that is killed in between can be resumed.
            write_state(self.output_dir, self._identity(), self.position, parts | {"made": self._made()})
            save_checkpoint(self.output_dir / LAST, self.checkpoint())

    def save_evaluated(self, ap: float | None) -> None:
        """Save after an evaluation, and write `best.safetensors` if none was better before.

        `ap` is what it gave, from 0 to 1, or None if there was nothing to measure.
        """
        improved = ap is not None and ap > self.position.best
        with self.interruption.held_back():
            self.position = replace(self.position, evaluated=self.position.epoch)
            if improved and ap is not None:
                self.position = replace(self.position, best=ap, best_on=self._validation)
                if self.process.is_main:
                    save_checkpoint(self.output_dir / BEST, self.checkpoint())
            self.save()

    def resume(self) -> bool:
        """Take up the run that `output_dir` holds; return False if it holds none.

        Raises TrainingError if it was another run (another recipe, seed, classes or number of processes), or
        if its state is damaged.
        """
        if not (self.output_dir / STATE).exists():
            return False
        defaults = default_settings(self.recipe)
        with reading_state(self.output_dir, self._identity(), defaults, self.process.device) as state:
            for name, part in self._parts().items():
                part.load_state_dict(state.get(name, {}))
            self.position = cast(Position, read_fields(Position, state["position"]))
            self.changed = tuple(
                f"the run was saved otherwise ({difference}): numbers will differ a little"
                # What a release has added to it was the same before.
                for difference in differences(state["made"], self._made(), self._made())
            )
        self._forget_another_best()
        return True

    def _forget_another_best(self) -> None:
        before, best = self.position.best_on, self.position.best
        if best >= 0 and before != self._validation:
            self.position = replace(self.position, best=-1.0, best_on=None)
            measured = f"{best:.3f} was measured on {before}, now it is measured on {self._validation}"
            self.changed += (f"the best AP begins anew: {measured}",)

    def checkpoint(self) -> Checkpoint:
        """Return the network as it is, ready to be exported."""
        done = self.position.epoch
        return Checkpoint(
            config=self.recipe.network,
            state={name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()},
            categories=self.categories,
            trained=self.position.step > 0,
            epoch=done - 1 if done else None,
            preprocessing=self.recipe.preprocessing,
        )

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a run to go on."""
        return {
            **flat(self.recipe.to_dict()),
            "seed": self.seed,
            "number of processes": self.process.world_size,
            "training data": self._data,
            "classes": [[category.id, category.name] for category in self.categories],
        }

    def _made(self) -> dict[str, Any]:
        """Return what decides in which order, and how exactly, numbers are added up."""
        return {
            "device": self.process.device.type,
            "type of backbone and neck": compute_on(self.process.device, self.recipe.optimisation.compute),
            "number of threads": torch.get_num_threads(),
            "PyTorch": str(torch.__version__),
        }

    def _parts(self) -> dict[str, Any]:
        """Return what has a state of its own."""
        return {"model": self.model, "optimizer": self.optimizer, "scaling": self.scaling}

    def _begin_update(self) -> None:
        """Keep what a forward pass changes, BatchNorm's statistics, until the update is made."""
        self._before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _roll_back(self) -> None:
        """Undo what an update that was broken off has changed."""
        if self._before is not None:
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(self._before[name])
            self._before = None

    def _add_gradients(
        self, batches: Iterator[Batch], passes: int, clock: _Clock
    ) -> tuple[dict[str, float], Batch]:
        """Add the mean gradients of so many batches; return the means of what is to be logged of them, and
        the last batch."""
        self.optimizer.zero_grad(set_to_none=True)
        logged: list[dict[str, float]] = []
        for part in range(passes):
            batch = next(batches).to(self.process.device)
            clock.lap("data")
            with self._communicating(part == passes - 1):
                total, losses = self._forward(batch, part, clock)
                self.scaling.backward(total / passes)
            logged.append(losses.to_host())
            clock.lap("backward")
        names = dict.fromkeys(name for values in logged for name in values)
        means = {name: _mean([values[name] for values in logged if name in values]) for name in names}
        return means, batch

    def _forward(self, batch: Batch, part: int, clock: _Clock) -> tuple[Tensor, Losses]:
        """Return the total of the losses of pass `part` of an update, and the losses."""
        try:
            total, losses = self._step(batch, self.position.epoch, self._generator(part), clock)
        except _NotFiniteError as error:
            self._fail("network's output", [str(error)], batch)
        if not torch.isfinite(total):
            self._fail("loss", losses.not_finite() or ["their sum"], batch)
        return total, losses

    def _update(self, clock: _Clock) -> dict[str, float]:
        """Make one optimiser step; return what there is to log of it."""
        epoch, step = self.position.epoch, self.position.step
        rates = set_learning_rate(self.optimizer, self.recipe.schedule.factor(epoch, step))
        norm = clip_gradients(self.model.parameters(), self.recipe.optimisation.max_gradient_norm)
        self._torn = True
        self.scaling.step(self.optimizer)
        clock.lap("optimizer")
        self._before = None
        self.position = replace(self.position, update=self.position.update + 1, step=step + 1)
        self._torn = False
        return {
            "epoch": float(epoch),
            **{f"lr_{name}": rate for name, rate in rates.items()},
            **({"gradient_norm": float(norm)} if torch.isfinite(norm) else {}),
            **self.scaling.values(),
            **{f"ms_{name}": value for name, value in clock.times_ms.items()},
        }

    def _communicating(self, now: bool) -> AbstractContextManager[None]:
        """Let processes share their gradients once an update, in its last pass."""
        if now or not isinstance(self._step, DistributedDataParallel):
            return nullcontext()
        return self._step.no_sync()

    def _generator(self, part: int) -> torch.Generator:
        """Seed the random numbers of one pass: they depend on where the run is, not on how it got there."""
        mixed = 0
        for number in (self.seed, self.position.step, part, self.process.rank):
            mixed = (mixed * 1_000_003 + number + 1) % (1 << 62)
        return torch.Generator().manual_seed(mixed)

    def _check_gradients(self, batch: Batch) -> None:
        named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        finite = torch.stack([torch.isfinite(gradient).all() for _, gradient in named])
        if not finite.all() and not self.scaling.excuses_overflow():
            self._fail(
                "gradient",
                [name for (name, _), fine in zip(named, finite.tolist(), strict=True) if not fine],
                batch,
            )

    def _fail(self, what: str, names: list[str], batch: Batch) -> NoReturn:
        """Keep the batch and say which part was not finite (TrainingError)."""
        path = self.output_dir / BAD_BATCH
        content = batch.to("cpu")._asdict()
        content |= {"targets": [tuple(t) for t in content["targets"]], "step": self.position.step}
        write_file(path, content)
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise TrainingError(
            f"the {what} is not finite in update {self.position.step + 1} ({listed}): the batch, of images "
            f"{', '.join(map(str, batch.image_ids))}, is in '{path}'; check their boxes, or lower "
            "optimisation.lr"
        )


class _Step(nn.Module):
    """Forward pass and losses as one module, which is what DistributedDataParallel wants to wrap."""

    def __init__(self, model: Asag, recipe: Recipe, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.recipe, self.autocast = model, recipe, autocast
        self.criterion = Criterion(recipe.loss, recipe.network.patch_size)

    def forward(
        self, batch: Batch, epoch: int, generator: torch.Generator, clock: _Clock
    ) -> tuple[Tensor, Losses]:
        """Return the total, which DistributedDataParallel follows back to the parameters, and all the
        parts."""
        hook = self.model.rpn.register_forward_pre_hook(_check_anchors)
        try:
            output = training_pass(
                self.model,
                batch.image,
                batch.image_size,
                targets=batch.targets,
                settings=self.recipe.patches,
                epoch=epoch,
                generator=generator,
                autocast=self.autocast,
            )
        finally:
            hook.remove()
        clock.lap("forward")
        losses = self.criterion(output, batch.targets, training=True)
        clock.lap("losses")
        return losses.total, losses


class _NotFiniteError(Exception):
    """Says what is not finite where the network cannot go on."""


def _check_anchors(relation: nn.Module, inputs: tuple[Any, ...]) -> None:
    # What is not a number lies on no pyramid level, where features are then looked up out of range.
    if not torch.isfinite(inputs[1]).all():
        raise _NotFiniteError("anchors")


class _Clock(Stopwatch):
    """A stopwatch that waits for the GPU, whose work is asynchronous."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._cuda = device.type == "cuda"

    def lap(self, name: str) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        super().lap(name)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Sum in a fixed order on the CPU; the backward pass of indexing would otherwise take any."""
    before = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(before or device.type == "cpu")
    # That is for finding reads of memory nobody wrote, and costs a tenth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = before and fills  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
