"""`asag-paper`: the paper's tables and figures on anybody's networks and data, beside the paper's numbers."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag_deploy.atomic import atomic_write_text, check_writable
from asag_deploy.command_line import (
    ALL_FINE,
    MOST_THREADS,
    OneSentenceParser,
    exit_code,
    listed,
    whole_number,
)
from asag_deploy.errors import ConfigError
from asag_deploy.replacing import check_own_folder, is_json_with
from asag_deploy.scratch import scratch_folder
from asag_evaluation.data.coco import VAL_SPLIT
from asag_evaluation.data.orientation import RULES, add_orientation_option

if TYPE_CHECKING:  # PyTorch is imported when there is something to measure
    from asag_bench.paper.measuring import Given

PROGRAM = "asag-paper"
_SCENES, _TIMED = 20, 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-paper` with these arguments (None: the command line's) and return its exit code.

    0: all fine; 2: nothing could be measured, with the reason in one sentence on stderr; 130: interrupted,
    after keeping what was measured.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        options = _parser().parse_args(arguments)
        options.command = f"{PROGRAM} {shlex.join(arguments)}"
        try:
            return int(options.run(options))
        except KeyboardInterrupt:
            print(f"{PROGRAM}: {options.interrupted}", file=sys.stderr)
            raise

    return exit_code(PROGRAM, command)


def _parser() -> argparse.ArgumentParser:
    top = OneSentenceParser(
        prog=PROGRAM, description="Measure what the paper measured, on your networks and data."
    )
    top.set_defaults(interrupted="interrupted")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, summary, add, run in (
        ("tables", "the paper's tables, each cell measured here beside the paper's", _add_tables, _tables),
        ("seeds", "the tables of several seeds as one, with what lies between the seeds", _add_seeds, _seeds),
        ("figures", "the paper's figures, drawn from your networks and pictures", _add_figures, _figures),
        ("roles", "the names that networks are given under, and what trains each", _add_nothing, _roles),
    ):
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        add(command)
        command.set_defaults(run=run)
    return top


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    """Add no option: `roles` takes none."""


def _add_given(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to measure, and on what."""
    add = parser.add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    add("--data", type=Path, metavar="DIR", help="a data set in COCO layout (default: the demo's scenes)")
    add("--split", default=VAL_SPLIT, metavar="NAME", help="which part of it (default: %(default)s)")
    add_orientation_option(parser)
    add("--limit", type=whole_number(1), metavar="N", help="use the first N images only (demo: 20)")
    network = {**several, "metavar": "ROLE=CHECKPOINT"}
    add("--network", **network, help="a checkpoint, and which of the paper's it is; may be repeated")
    add(
        "--peer",
        **several,
        metavar="ROLE=FOLDER",
        help="a folder of `asag-bench train-peer`; may be repeated",
    )
    add("--demo", action="store_true", help="the project's own small network on generated scenes (default)")
    threads = "of PyTorch (default: as many as it takes)"
    add("--threads", type=whole_number(1, MOST_THREADS), metavar="N", help=threads)
    where = "where AP is measured, cpu, cuda or cuda:N (default: cpu); all times are the CPU's"
    add("--device", default="cpu", metavar="D", help=where)
    add("--quiet", action="store_true", help="no progress")


def _add_tables(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(interrupted="interrupted; with --output-dir, the same command goes on")
    _add_given(parser)
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="N,...", help="only these tables, such as 5b,8")
    add(
        "--time-images",
        type=whole_number(0),
        default=10,
        metavar="N",
        help="images that are timed; 0: time nothing (default: 10)",
    )
    add("--output-dir", type=Path, metavar="DIR", help="write paper.json and paper.md; what is in it is kept")


def _tables(options: argparse.Namespace) -> int:
    from asag_bench.paper.measuring import Measurer
    from asag_bench.paper.page import header
    from asag_bench.paper.store import PAGE, Store
    from asag_bench.paper.tables import as_json, chosen_tables, fill, markdown_lines, screen_lines
    from asag_bench.result import to_json

    tables = chosen_tables(listed(options.only))
    with given(options, timed=options.time_images) as of:
        store = Store(options.output_dir, options.command)
        measurer = Measurer(of, store)
        filled = fill(tables, measurer)
        about = header(measurer)
    if options.output_dir is not None:
        store.write({"header": about, "machine": to_json(measurer.machine), "tables": as_json(filled)})
        lines = [
            *(f"- {line}" for line in about),
            "",
            *(line for table in filled for line in markdown_lines(table)),
        ]
        atomic_write_text(options.output_dir / PAGE, "# The paper's tables, here\n\n" + "\n".join(lines))
    print("\n".join([*about, "", *(line for table in filled for line in screen_lines(table))]))
    return ALL_FINE


def _add_seeds(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    folders = "folders of `asag-paper tables`, one for each seed that the networks were trained with"
    add("folders", type=Path, nargs="+", metavar="DIR", help=folders)
    add("--output-dir", type=Path, metavar="DIR", help="write seeds.json, seeds.md and seeds.png")


def _seeds(options: argparse.Namespace) -> int:
    from asag_bench.paper.figures.gains import write_gains
    from asag_bench.paper.seeds import (
        PAGE_OF_SEEDS,
        PICTURE,
        SEEDS,
        as_file,
        over_seeds,
        page,
        read_run,
        screen_lines,
    )
    from asag_bench.result import json_text
    from asag_evaluation.plots import check_plots

    runs = [read_run(folder) for folder in options.folders]
    content, folder = as_file(runs, over_seeds(runs), options.command), options.output_dir
    if folder is not None:
        check_plots(PROGRAM)
        is_own = is_json_with("command", "seeds")
        check_own_folder(folder, (SEEDS, PAGE_OF_SEEDS, PICTURE), is_own, "tables of seeds")
        check_writable(folder)
        atomic_write_text(folder / SEEDS, json_text(content))
        atomic_write_text(folder / PAGE_OF_SEEDS, page(content))
        write_gains(folder / PICTURE, content)
    print("\n".join(screen_lines(content)))
    return ALL_FINE


@contextmanager
def given(options: argparse.Namespace, *, timed: int = 0) -> Iterator[Given]:
    """Read what the user gives; without data, draw the demo's scenes for the moment.

    Raises ConfigError where the options make no sense together.
    """
    import torch

    from asag_bench.paper.measuring import Given
    from asag_bench.paper.roles import REFERENCE

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    networks = _by_role("--network", options.network)
    peers = _by_role("--peer", options.peer)
    more: dict[str, Any] = {"timed": timed, "orientation": options.orientation, "quiet": options.quiet}
    more["device"] = options.device
    more["note"] = _note
    if options.data is not None:
        if options.demo:
            raise ConfigError("--demo draws its own scenes: leave --data out, or --demo")
        yield Given(
            data=options.data,
            split=options.split,
            networks=networks,
            peers=peers,
            limit=options.limit,
            **more,
        )
        return
    if options.split != VAL_SPLIT or options.orientation != RULES[0]:
        raise ConfigError("--split and --orientation are for your own data: give --data, or leave them out")
    if networks or peers:
        raise ConfigError(
            "networks are measured on their data: give --data DIR, or no --network and no --peer"
        )
    from asag_evaluation.data.scenes import write_scenes
    from asag_export.demo.networks import CHECKPOINT, SEED

    with scratch_folder() as folder:
        data = folder / "scenes"
        write_scenes(data, count=options.limit or _SCENES, seed=SEED, size=320, split=VAL_SPLIT)
        yield Given(data=data, split=VAL_SPLIT, networks={REFERENCE: CHECKPOINT}, peers={}, **more)


def _note(sentence: str) -> None:
    print(f"{PROGRAM}: note: {sentence}", file=sys.stderr)


def _by_role(option: str, texts: Sequence[str]) -> dict[str, Path]:
    """Read ROLE=PATH, each role once (ConfigError otherwise)."""
    found: dict[str, Path] = {}
    for text in texts:
        role, equals, path = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"{option} is '{text}'; expected ROLE=PATH, with one of `{PROGRAM} roles`")
        if role in found:
            raise ConfigError(f"{option} names the role {role} twice: give one network for each")
        found[role] = Path(path)
    return found


def _roles(options: argparse.Namespace) -> int:
    from asag_bench.paper.roles import REFERENCE, ROLES, how_to_make

    base = ROLES[REFERENCE].recipe
    for role in ROLES.values():
        print(f"{role.name} (tables {', '.join(role.tables)}): {role.about}")
        print(f"    {how_to_make(role, base)}")
    return ALL_FINE


def _add_figures(parser: argparse.ArgumentParser) -> None:
    _add_given(parser)
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="N,...", help="only these figures, such as 6,C-2")
    add(
        "--run",
        dest="run_of",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a checkpoint of one training run, for figure 5; repeated, in their order",
    )
    add("--pictures", type=whole_number(1), default=8, metavar="N", help="that are drawn on (default: 8)")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="for the figures, as PNG")


def _figures(options: argparse.Namespace) -> int:
    from asag_evaluation.plots import check_plots

    check_plots(PROGRAM)
    from asag_bench.paper.figures.draw import FILES, check_numbers, draw
    from asag_bench.paper.measuring import Measurer
    from asag_bench.paper.store import Store

    numbers = check_numbers(listed(options.only))
    with given(options, timed=_TIMED) as of:
        measurer = Measurer(of, Store(options.output_dir, options.command, FILES))
        drawn = draw(numbers, measurer, options.output_dir, run=options.run_of, pictures=options.pictures)
    for path in drawn.paths:
        print(path)
    for number, reason in drawn.missing.items():
        print(f"figure {number}: {reason}")
    return ALL_FINE


if __name__ == "__main__":
    sys.exit(main())
