"""The commands `train-peer` and `front` of `asag-bench`: their options, and what they print."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from asag_deploy.atomic import atomic_write_text, check_writable, check_writable_file
from asag_deploy.backends import DEFAULT_BACKEND, check_backend
from asag_deploy.command_line import ALL_FINE, MOST_THREADS, listed, real_number, whole_number
from asag_deploy.errors import ConfigError, OutputError, plural
from asag_deploy.replacing import check_own_file, check_own_folder, is_json_with
from asag_evaluation.data.coco import TRAIN_SPLIT, CocoDataset
from asag_evaluation.data.orientation import add_orientation_option

RESULT, PAGE, TABLE, FRONT_PLOT, TIMES_PLOT = (
    "front.json",
    "front.md",
    "pictures.csv",
    "front.png",
    "times.png",
)


def add_train_peer(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train-peer`."""
    parser.set_defaults(interrupted="interrupted; the same command goes on")
    add = parser.add_argument
    add("peer", metavar="PEER", help="yolox-lite (dense), d-fine-lite (DETR-like) or adamixer-6 (six layers)")
    add("--data", type=Path, required=True, metavar="DIR", help="a data set in COCO layout")
    add(
        "--output-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="for its weights and log; a run in it goes on",
    )
    add(
        "--like",
        default="scenes-lite",
        metavar="RECIPE",
        help="whose backbone, pictures and schedule it has (default: %(default)s)",
    )
    add("--epochs", type=whole_number(1), metavar="N", help="how long (default: as the recipe)")
    add("--lr", type=real_number(0, 1, above=True), metavar="R", help="learning rate (default: the peer's)")
    add("--queries", type=whole_number(1), metavar="N", help="of the DETR-like peers (default: 300)")
    add("--query-weighting", action="store_true", help="weigh matched queries as ASAG does (adamixer-6)")
    add("--seed", type=whole_number(0), default=0, metavar="S", help="another seed, another run (default: 0)")
    add("--threads", type=whole_number(1, MOST_THREADS), default=1, metavar="N", help="default: %(default)s")
    add("--quiet", action="store_true", help="no progress, and no line at the end")
    add_orientation_option(parser)


def train_peer(options: argparse.Namespace) -> int:
    """Train a peer to the end of its schedule."""
    import torch

    from asag_bench.light_peers.peer import Said
    from asag_bench.light_peers.recipe import peer_recipe, stretched
    from asag_bench.light_peers.training import PeerTraining, check_queries
    from asag_training.run.alone import alone_in

    recipe = peer_recipe(options.peer, options.like)
    data = CocoDataset.open(options.data, TRAIN_SPLIT, orientation=options.orientation).for_training()
    changes: dict[str, Any] = {
        "network": recipe.network.with_changes(num_classes=len(data.categories)),
        "schedule": stretched(recipe.schedule, options.epochs or recipe.schedule.epochs),
    }
    if options.lr is not None:
        changes["lr"] = options.lr
    if options.queries is not None:
        if recipe.peer == "yolox-lite":
            raise ConfigError("--queries is for peers that have queries: leave it out for yolox-lite")
        changes["queries"] = options.queries
    changes["query_weighting"] = options.query_weighting
    said = Said(recipe=dataclasses.replace(recipe, **changes), categories=data.categories, seed=options.seed)
    check_queries(said.recipe, data)
    folder: Path = options.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"could not make the folder '{folder}' ({error.strerror}): give another") from error
    torch.set_num_threads(options.threads)
    with alone_in(folder):
        training = PeerTraining(said, data, folder, options.orientation)
        training(quiet=options.quiet)
    if not options.quiet:
        of = f"{said.recipe.peer}, seed {said.seed}, {plural(training.position.step, 'update')}"
        as_told = () if options.orientation == "auto" else ("--orientation", options.orientation)
        measured = ("asag-bench", "eval-peer", str(folder), "--data", str(options.data), *as_told)
        measures = shlex.join(measured)
        print(f"{folder}: {of}; `{measures}` measures it")
    return ALL_FINE


def add_eval_peer(parser: argparse.ArgumentParser) -> None:
    """Add the options of `eval-peer`."""
    add = parser.add_argument
    add("peer", type=Path, metavar="DIR", help="a folder of train-peer")
    add("--data", type=Path, required=True, metavar="DIR", help="a data set in COCO layout")
    add("--limit", type=whole_number(1), metavar="N", help="use the first N pictures only")
    add("--output", type=Path, metavar="FILE", help="write the figures there as JSON")
    add("--quiet", action="store_true", help="no progress")
    add_orientation_option(parser)


def eval_peer(options: argparse.Namespace) -> int:
    """Measure the AP of a trained peer in PyTorch."""
    from asag_bench.light_peers.evaluation import DETECTIONS, evaluate_peer
    from asag_bench.light_peers.peer import read_said, unfinished
    from asag_bench.result import json_text
    from asag_evaluation.report import precision_lines

    check_own_file(options.output, is_json_with("command", "coco"), "figures of asag-bench")
    check_writable_file(options.output)
    given: dict[str, Any] = {"limit": options.limit, "orientation": options.orientation}
    unfinished(options.peer, read_said(options.peer).recipe.schedule.epochs)
    found = evaluate_peer(options.peer, options.data, **given, most=DETECTIONS, quiet=options.quiet)
    if options.output is not None:
        result = {"command": options.command, "detections": DETECTIONS, "coco": found.to_dict()}
        atomic_write_text(options.output, json_text(result))
    told = f"of the {DETECTIONS} best detections of each picture, as `asag-bench front` counts"
    print("\n".join([*precision_lines(found, DETECTIONS), told]))
    return ALL_FINE


def add_front(parser: argparse.ArgumentParser) -> None:
    """Add the options of `front`."""
    add = parser.add_argument
    several: dict[str, Any] = {"type": Path, "action": "append", "default": [], "metavar": "DIR"}
    add("--data", type=Path, required=True, metavar="DIR", help="a data set in COCO layout")
    add(
        "--bundle",
        **several,
        required=True,
        help="a bundle's folder or address; several seeds; may be repeated",
    )
    add(
        "--run",
        dest="run_dirs",
        **several,
        help="the run of asag-train that each bundle is of: what it cost is told",
    )
    add("--peer", **several, help="a folder of train-peer; may be repeated")
    add(
        "--backend",
        action="append",
        default=[],
        metavar="B,...",
        help=f"what runs all of them (default: {DEFAULT_BACKEND})",
    )
    add("--threads", type=whole_number(1, MOST_THREADS), default=1, metavar="N", help="default: %(default)s")
    add("--rounds", type=whole_number(1), default=5, metavar="N", help="timed calls a picture (default: 5)")
    add("--limit", type=whole_number(1), metavar="N", help="use the first N pictures only")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="for tables and plots")
    add("--quiet", action="store_true", help="no progress and no table")
    add_orientation_option(parser)


def front(options: argparse.Namespace) -> int:
    """Measure accuracy and times of light ASAG and of its peers."""
    from asag_bench.front.measure import FrontPlan, measure_front
    from asag_bench.front.plots import write_plots
    from asag_bench.front.table import csv_text, markdown
    from asag_bench.result import json_text
    from asag_evaluation.plots import check_plots

    backends = listed(options.backend) or (DEFAULT_BACKEND,)
    for backend in backends:
        check_backend(backend)
    plan = FrontPlan(
        command=options.command,
        data=options.data,
        bundles=tuple(options.bundle),
        runs=tuple(options.run_dirs),
        peers=tuple(options.peer),
        backends=backends,
        threads=options.threads,
        rounds=options.rounds,
        limit=options.limit,
        orientation=options.orientation,
        quiet=options.quiet,
    )
    check_plots("asag-bench")
    files = (RESULT, PAGE, TABLE, FRONT_PLOT, TIMES_PLOT)
    check_own_folder(
        options.output_dir, files, is_json_with("command", "machine", "contenders"), "a measured front"
    )
    check_writable(options.output_dir)
    result = measure_front(plan)
    text = markdown(result)
    atomic_write_text(options.output_dir / RESULT, json_text(result))
    atomic_write_text(options.output_dir / TABLE, csv_text(result))
    write_plots(result, options.output_dir)
    atomic_write_text(
        options.output_dir / PAGE, text + f"\n![AP against time]({FRONT_PLOT})\n\n![Times]({TIMES_PLOT})\n"
    )
    if not options.quiet:
        print(text)
    return ALL_FINE
