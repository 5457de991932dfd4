"""`training/train.py` and `asag-train`: train a network from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from asag_deploy import __version__
from asag_deploy.atomic import atomic_write
from asag_deploy.errors import AsagError, ConfigError, OutputError
from asag_training.checkpoints import load_backbone, load_checkpoint
from asag_training.data.coco import CocoDataset
from asag_training.data.loading import TrainingLoader
from asag_training.distributed import Process, joined
from asag_training.evaluation.evaluate import Evaluation, evaluate
from asag_training.evaluation.predictor import network_predictor
from asag_training.model import Asag
from asag_training.pictures import write_progress_pictures
from asag_training.recipes import RECIPES, Recipe, recipe
from asag_training.run_log import RunLog
from asag_training.trainer import Trainer

PROGRAM = "asag-train"


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns 0, 2 with the reason in one sentence on stderr, or 130 when interrupted."""
    try:
        options = _parser().parse_args(argv)
        with joined(options.device) as process:
            _train(options, process)
    except AsagError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{PROGRAM} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Train an ASAG network on data in COCO layout.")
    add = parser.add_argument
    add("--version", action="version", version=f"{PROGRAM} {__version__}")
    add("--data", type=Path, required=True, help="folder with annotations/ and the images")
    add("--output-dir", type=Path, required=True, help="checkpoints, logs and pictures go here")
    add("--recipe", default="scenes", help=f"one of {', '.join(RECIPES)} (default %(default)s)")
    add(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="PART.NAME=VALUE",
        help="change a setting of the recipe, e.g. network.patch_size=12; may be repeated",
    )
    add("--train-split", default="train2017")
    add("--val-split", default="val2017")
    add("--backbone", type=Path, metavar="FILE", help="ResNet weights to start the backbone from")
    add("--init", type=Path, metavar="FILE", help="a checkpoint of the same network to start from")
    add("--resume", action="store_true", help="take up the run that is in the output folder")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=2, help="processes that read images (default %(default)s)")
    add("--device", default="auto", help="cpu, cuda or auto (default)")
    add("--save-every", type=int, default=1, metavar="EPOCHS")
    add("--evaluate-every", type=int, default=1, metavar="EPOCHS")
    add("--evaluate-images", type=int, metavar="N", help="evaluate on the first N images only")
    add("--pictures", type=int, default=4, metavar="N", help="images drawn at every evaluation (default 4)")
    return parser


def _train(options: argparse.Namespace, process: Process) -> None:
    chosen = recipe(options.recipe, options.changes)
    training = CocoDataset.open(options.data, options.train_split).for_training()
    validation = CocoDataset.open(options.data, options.val_split, categories=training.categories)
    if options.evaluate_images is not None:
        validation = validation.subset(range(min(options.evaluate_images, len(validation))))
    network = chosen.network.with_changes(num_classes=len(training.categories))
    chosen = dataclasses.replace(chosen, network=network)
    torch.manual_seed(options.seed)
    # On the CPU the backward pass of indexing is otherwise summed in any order, and no run repeats another.
    torch.use_deterministic_algorithms(process.device.type == "cpu")
    trainer = Trainer(
        chosen,
        _starting_point(options, chosen),
        training.categories,
        options.output_dir,
        seed=options.seed,
        process=process,
    )
    resumed = _open_output(options, trainer)
    loader = _loader(options, chosen, training, process)
    if process.is_main:
        print(f"training:   {training.counts.describe()}")
        print(f"validation: {validation.counts.describe()}")
        beginning = "resuming at" if resumed else "starting with"
        print(f"{beginning} epoch {trainer.position.epoch} on {process.device}")
    _run(options, chosen, trainer, loader, validation)


def _run(
    options: argparse.Namespace,
    chosen: Recipe,
    trainer: Trainer,
    loader: TrainingLoader,
    validation: CocoDataset,
) -> None:
    first = trainer.position
    updates = max(loader.batches_per_epoch // chosen.optimisation.accumulate, 1)
    total = chosen.schedule.epochs * updates
    main = trainer.process.is_main
    with (
        RunLog(options.output_dir, first.step, first.epoch) as log,
        tqdm(total=total, initial=first.step, unit="update", disable=not main, file=sys.stderr) as bar,
    ):

        def on_step(values: Mapping[str, float]) -> None:
            if main:
                log.step(trainer.position.step, values)
                bar.set_postfix_str(f"epoch {int(values['epoch'])} loss {values['loss']:.2f}")
                bar.update()

        while trainer.position.epoch < chosen.schedule.epochs:
            trainer.train_epoch(loader, on_step)
            epoch = trainer.position.epoch
            last = epoch == chosen.schedule.epochs
            ap: float | None = None
            if last or epoch % options.evaluate_every == 0:
                ap = _evaluate(options, trainer, validation, log)
            if last or ap is not None or epoch % options.save_every == 0:
                trainer.save(best=ap)


def _evaluate(
    options: argparse.Namespace, trainer: Trainer, validation: CocoDataset, log: RunLog
) -> float | None:
    """Measure the network on the validation images, in the main process."""
    if not trainer.process.is_main:
        return None
    epoch = trainer.position.epoch
    trainer.model.eval()
    predictor = network_predictor(
        trainer.model,
        trainer.categories,
        preprocessing=trainer.recipe.preprocessing,
        device=trainer.process.device,
    )
    result = evaluate(predictor.detector, validation)
    count = min(options.pictures, len(validation))
    write_progress_pictures(
        predictor.detector, validation, range(count), options.output_dir / "pictures", epoch
    )
    trainer.model.train()
    values = _summary(result)
    log.evaluation(epoch, trainer.position.step, values)
    tqdm.write(
        f"epoch {epoch}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()), sys.stderr
    )
    return values["AP"]


def _summary(result: Evaluation) -> dict[str, float]:
    """The few numbers to watch."""
    metrics = result.coco.to_dict()
    anchors = result.anchors.to_dict()
    numbers = {**{k: metrics[k] for k in metrics}, **{k: anchors[k] for k in anchors}}
    return {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}


def _starting_point(options: argparse.Namespace, chosen: Recipe) -> Asag:
    if options.init is not None and options.backbone is not None:
        raise ConfigError("--init brings a whole network: leave --backbone out")
    model = Asag(chosen.network)
    if options.init is not None:
        model.load_state_dict(dict(load_checkpoint(options.init, variant=chosen.network).state))
    if options.backbone is not None:
        load_backbone(model, options.backbone)
    return model


def _open_output(options: argparse.Namespace, trainer: Trainer) -> bool:
    """Make the output folder, or take up the run in it."""
    folder: Path = options.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"could not make the folder '{folder}': {error.strerror}; give another") from error
    if options.resume:
        return trainer.resume()
    if (folder / "state.pt").exists():
        raise ConfigError(
            f"'{folder}' holds a run already: add --resume to take it up, or give another folder"
        )
    if trainer.process.is_main:
        with atomic_write(folder / "recipe.json") as temporary:
            text = json.dumps({**trainer.recipe.to_dict(), "seed": options.seed}, indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")
    return False


def _loader(
    options: argparse.Namespace, chosen: Recipe, training: CocoDataset, process: Process
) -> TrainingLoader:
    """Batches of this process: its share of an update, in as many passes as the recipe wants."""
    o = chosen.optimisation
    share = process.world_size * o.accumulate
    if o.batch_size % share:
        raise ConfigError(
            f"a batch of {o.batch_size} images cannot be split among {process.world_size} processes and "
            f"{o.accumulate} passes: change optimisation.batch_size"
        )
    return TrainingLoader(
        training,
        chosen.augmentation,
        batch_size=o.batch_size // share,
        seed=options.seed,
        preprocessing=chosen.preprocessing,
        workers=options.workers,
        rank=process.rank,
        world_size=process.world_size,
        pin_memory=process.device.type == "cuda",
    )


if __name__ == "__main__":
    sys.exit(main())
