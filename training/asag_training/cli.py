"""`training/train.py` and `asag-train`: train a network from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from asag_deploy.atomic import atomic_write_text
from asag_deploy.command_line import (
    ALL_FINE,
    OneSentenceParser,
    exit_code,
    printable,
    whole_number,
)
from asag_deploy.errors import ConfigError, OutputError, plural
from asag_evaluation.data.coco import TRAIN_SPLIT, VAL_SPLIT, CocoDataset
from asag_evaluation.data.orientation import add_orientation_option
from asag_training.recipes import ABLATIONS, AT, RECIPES, Recipe, recipe
from asag_training.settings import WEIGHTS_CHOICES

if TYPE_CHECKING:  # PyTorch is imported when there is something to train
    from asag_training.data.loading import TrainingLoader
    from asag_training.run.process import Process
    from asag_training.run.trainer import Trainer

PROGRAM = "asag-train"
RECIPE = "recipe.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-train` with these arguments (None: the command line's) and return its exit code.

    0: trained; 2: it could not be, with the reason in one sentence on stderr; 130, 143 or 129: interrupted by
    Ctrl-C, SIGTERM or SIGHUP, after saving.
    """

    def command() -> int:
        options = _parser().parse_args(argv)
        from asag_training.run.process import joined

        try:
            with joined(options.device) as process:
                _train(options, process)
        except KeyboardInterrupt:
            print(f"{PROGRAM}: interrupted; the same command with --resume goes on", file=sys.stderr)
            raise
        return ALL_FINE

    return exit_code(PROGRAM, command)


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(prog=PROGRAM, description="Train an ASAG network on data in COCO layout.")
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder with annotations/ and the images")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="for checkpoints, logs and pictures")
    add(
        "--recipe",
        default="scenes",
        metavar=f"NAME[{AT}ABLATION]",
        help=f"{', '.join(RECIPES)} (default: %(default)s); each also as one of the paper's ablations: "
        f"{', '.join(ABLATIONS)}",
    )
    add(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="PART.NAME=VALUE",
        help="change a setting of the recipe, e.g. network.patch_size=12; may be repeated",
    )
    add("--train-split", default=TRAIN_SPLIT, metavar="NAME", help="default: %(default)s")
    add("--val-split", default=VAL_SPLIT, metavar="NAME", help="default: %(default)s")
    add_orientation_option(parser)
    add(
        "--backbone",
        type=Path,
        metavar="FILE",
        help="ImageNet weights for the backbone, a file or its address",
    )
    add(
        "--init",
        type=Path,
        metavar="FILE",
        help="a checkpoint of the recipe's network to start from, with any classes, or its address",
    )
    add(
        "--weights",
        choices=WEIGHTS_CHOICES,
        help="which of its weights: those trained (default), or their average, EMA",
    )
    add("--resume", action="store_true", help="take up the run in the output folder, if it holds one")
    add("--device", default="auto", metavar="D", help="cpu, cuda or auto (the default)")
    _add_numbers(parser)
    return parser


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    def add(name: str, default: int | None, metavar: str, meaning: str, least: int = 1) -> None:
        parser.add_argument(
            name,
            type=whole_number(least),
            default=default,
            metavar=metavar,
            help=f"{meaning} (default: {'all' if default is None else default})",
        )

    add("--seed", 0, "S", "another seed, another run", least=0)
    add("--workers", 2, "N", "processes that read images; 0: none besides the training", least=0)
    add("--save-every", 1, "EPOCHS", "how often the run is saved")
    add("--save-minutes", 15, "MINUTES", "how often it is saved within an epoch")
    add("--evaluate-every", 1, "EPOCHS", "how often it is evaluated")
    add("--evaluate-images", None, "N", "evaluate on the first N images only")
    add("--pictures", 4, "N", "images drawn at every evaluation", least=0)


def _train(options: argparse.Namespace, process: Process) -> None:
    from asag_training.run.alone import alone_in
    from asag_training.run.process import check_same_step, keep_freed_memory
    from asag_training.run.run_loop import Rhythm, TrainingRun
    from asag_training.run.start import start
    from asag_training.run.state import STATE, data_in_words
    from asag_training.run.trainer import Trainer
    from asag_training.run.worth import check_beginning, check_length

    chosen = recipe(options.recipe, options.changes)
    resumes = options.resume and (options.output_dir / STATE).exists()
    if not resumes:
        check_beginning(chosen, pretrained=options.init is not None or options.backbone is not None)
    found = CocoDataset.open(options.data, options.train_split, orientation=options.orientation)
    training = found.for_training()
    held_out = CocoDataset.open(
        options.data, options.val_split, categories=training.categories, orientation=options.orientation
    )
    validation = held_out.first(options.evaluate_images)
    chosen, model, notes = start(
        chosen,
        training.categories,
        seed=options.seed,
        init=options.init,
        weights=options.weights,
        backbone=options.backbone,
        named=[change.partition("=")[0] for change in options.changes],
    )
    loader = _loader(options, chosen, training, process)
    keep_freed_memory()
    trainer = Trainer(
        chosen,
        model,
        training.categories,
        options.output_dir,
        seed=options.seed,
        data=data_in_words(training, options.orientation),
        validation=data_in_words(validation, options.orientation),
        process=process,
    )
    if not resumes:
        check_length(chosen, trainer.updates_per_epoch(loader), probes=options.init is not None)
    _make_folder(options.output_dir)
    with alone_in(options.output_dir) if process.is_main else nullcontext():
        resumed = _open_output(options, trainer)
        check_same_step(trainer.position.step)
        if process.is_main:
            for sentence in trainer.changed if resumed else notes:
                print(sentence)
            for part, data, used in (("training:  ", found, training), ("validation:", held_out, validation)):
                use = plural(len(used), "image is used", "images are used")
                print(part, f"{data.counts.describe()}; {use}")
                left_out = data.left_out_of_training() if data is found else ""
                for remark in filter(None, (left_out, *data.remarks())):
                    print(part, printable(remark))
            done = f"{trainer.position.epoch} of {chosen.schedule.epochs} epochs are done"
            print(f"{f'resuming, {done}' if resumed else 'starting'}, on {process.device}", flush=True)
        rhythm = Rhythm(
            save_every=options.save_every,
            save_minutes=options.save_minutes,
            evaluate_every=options.evaluate_every,
            pictures=options.pictures,
        )
        TrainingRun(trainer, loader, validation, rhythm)()


def _make_folder(folder: Path) -> None:
    """Make the output folder, if it is not there (OutputError if it cannot be made)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        exists = isinstance(error, FileExistsError)
        reason = "it is a file" if exists else (error.strerror or str(error)).lower()
        raise OutputError(f"could not make the folder '{folder}' ({reason}): give another") from error


def _open_output(options: argparse.Namespace, trainer: Trainer) -> bool:
    """Take up the run in the output folder, or begin one; return whether there was one."""
    from asag_training.run.state import BEST, LAST, STATE

    folder: Path = options.output_dir
    if _is_of_a_peer(folder):
        raise ConfigError(f"'{folder}' holds a run of `asag-bench train-peer`: give another folder")
    if options.resume and trainer.resume():
        return True
    if any((folder / name).exists() for name in (STATE, LAST, BEST)):
        raise ConfigError(
            f"'{folder}' holds a run already: add --resume to take it up, or give another folder"
            if (folder / STATE).exists()
            else f"'{folder}' holds checkpoints of another run, but no {STATE}: give another folder"
        )
    foreign = _foreign(folder)
    if foreign is not None:
        raise ConfigError(f"'{folder}' holds a '{foreign}' that no run has written: give another folder")
    if trainer.process.is_main:
        text = json.dumps({**trainer.recipe.to_dict(), "seed": options.seed}, indent=2)
        atomic_write_text(folder / RECIPE, text + "\n")
    return False


def _is_of_a_peer(folder: Path) -> bool:
    """Return whether a folder holds a run of `asag-bench train-peer`, which has files of the same names."""
    from asag_training.run.state import is_of_train_peer

    try:
        recipe_there = json.loads((folder / RECIPE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return is_of_train_peer(recipe_there)


def _foreign(folder: Path) -> str | None:
    """Return what a run would replace but has not written.

    One that was ended before it was first saved has left its recipe.
    """
    from asag_training.run.log import EVALUATIONS, STEPS
    from asag_training.run.state import is_of_asag_train

    try:
        recipe_there = json.loads((folder / RECIPE).read_bytes())
    except FileNotFoundError:
        return next((name for name in (STEPS, EVALUATIONS) if (folder / name).exists()), None)
    except (OSError, ValueError, RecursionError):
        return RECIPE
    return None if is_of_asag_train(recipe_there) else RECIPE


def _loader(
    options: argparse.Namespace, chosen: Recipe, training: CocoDataset, process: Process
) -> TrainingLoader:
    """Open the batches of this process: its share of an update, in as many passes as the recipe wants."""
    from asag_training.data.loading import TrainingLoader

    o = chosen.optimisation
    share = process.world_size * o.accumulate
    if o.batch_size % share:
        among = f"{plural(process.world_size, 'process')} and {plural(o.accumulate, 'pass')}"
        raise ConfigError(
            f"a batch of {plural(o.batch_size, 'image')} cannot be split among {among}: change "
            f"optimisation.batch_size to a multiple of {share}"
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
