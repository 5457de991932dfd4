"""The command `gmacs` of `asag-bench`: its options, and what it prints."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag_bench.gmacs.published import (
    NAMED_SHAPES,
    PAPER_PATCHES,
    PUBLISHED,
    Published,
    published,
)
from asag_bench.reports.columns import TextRow, in_markdown, on_screen
from asag_bench.result import json_text, read_shape
from asag_bench.runners.compared.published import COMPARED, PAPER_SHAPE
from asag_deploy.atomic import atomic_write_text, check_writable_file
from asag_deploy.command_line import ALL_FINE, numbers, whole_number
from asag_deploy.errors import ConfigError
from asag_deploy.replacing import check_own_file, is_json_with

if TYPE_CHECKING:
    from asag_training.network.config import AsagConfig

_MOST_QUERIES = 100_000
_USUAL_LIKE = "asag-a-r50-100"
_USUAL_PATCHES = ",".join(map(str, PAPER_PATCHES))


def add_gmacs(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gmacs`."""
    add = parser.add_argument
    add(
        "networks",
        nargs="*",
        metavar="NETWORK",
        help=f"a variant, a checkpoint, or one of {', '.join(COMPARED)} (default: the paper's)",
    )
    names = ", ".join(NAMED_SHAPES)
    add("--shape", metavar="HxW", help=f"of the image, or {names} (default: the size that the paper counts)")
    add("--queries", type=whole_number(1, _MOST_QUERIES), metavar="N", help="(default: as the paper's mean)")
    add(
        "--patches",
        type=numbers(whole_number(0)),
        metavar="N,N",
        help=f"probed on P4 and P3 (default: {_USUAL_PATCHES}, about the paper's mean)",
    )
    add("--like", metavar="NETWORK", help=f"whose backbone the others have (default: {_USUAL_LIKE})")
    add("--markdown", action="store_true", help="print a table for a page")
    add("--output", type=Path, metavar="FILE", help="write the counts there as JSON")


def gmacs(options: argparse.Namespace) -> int:
    """Count and print; nothing is computed, so that it takes seconds."""
    check_own_file(options.output, is_json_with("command", "counts"), "counts")
    check_writable_file(options.output)
    shape = None if options.shape is None else NAMED_SHAPES.get(options.shape) or read_shape(options.shape)
    rows = _rows(options, shape)
    _check_used(options, rows)
    counts = [_count(row, options) for row in rows]
    if options.output is not None:
        result = {"command": options.command, "counts": counts}
        atomic_write_text(options.output, json_text(result))
    table = _table(counts)
    print("\n".join(in_markdown(table) if options.markdown else on_screen(table)))
    return ALL_FINE


def _rows(options: argparse.Namespace, shape: tuple[int, int] | None) -> list[Published]:
    """Return what is to be counted: a network, its queries, a size."""
    found = []
    asked = options.networks or list(dict.fromkeys(row.network for row in PUBLISHED))
    for network in asked:
        known = [row for row in PUBLISHED if row.network == network]
        if not known or options.queries is not None:
            queries = options.queries or _mean_queries(network)
            known = [Published(network=network, queries=queries, gmacs=None, shape=_usual(known))]
        found += [dataclasses.replace(row, shape=shape or row.shape) for row in known]
    return found


def _usual(known: list[Published]) -> tuple[int, int]:
    return known[0].shape if known else PAPER_SHAPE


def _mean_queries(network: str) -> int:
    """Guess how many queries a network without published figures has: twice a first-level patch's anchors."""
    from asag_bench.runners.compared.runner import query_count

    return query_count(_config(network))


def _config(network: str) -> AsagConfig:
    """Return the settings of a variant, or of a checkpoint.  Raises ConfigError if it is neither."""
    from asag_training.network.config import VARIANTS

    if network in VARIANTS:
        return VARIANTS[network]
    if not Path(network).is_file():
        known = ", ".join((*VARIANTS, *COMPARED))
        raise ConfigError(f"'{network}' is no network that is known, and no file; the networks are {known}")
    from asag_training.checkpoints import load_checkpoint

    return load_checkpoint(Path(network)).config


def _count(row: Published, options: argparse.Namespace) -> dict[str, Any]:
    from asag_bench.gmacs.count import count_asag, count_compared

    if row.network in COMPARED:
        parts = count_compared(row.network, _config(options.like or _USUAL_LIKE), row.shape, row.queries)
    else:
        parts = count_asag(_config(row.network), row.shape, row.queries, _patches(options))
    as_published = options.like in (None, _USUAL_LIKE) and _patches(options) == PAPER_PATCHES
    return {
        "network": row.network,
        "shape": list(row.shape),
        "queries": row.queries,
        "parts": {name: round(gmacs, 4) for name, gmacs in parts.items()},
        "gmacs": round(sum(parts.values()), 3),
        "paper": published(row.network, row.queries, row.shape) if as_published else None,
    }


def _patches(options: argparse.Namespace) -> tuple[int, int]:
    on_p4, *on_p3 = (int(part) for part in (options.patches or _USUAL_PATCHES).split(","))
    if len(on_p3) != 1:
        raise ConfigError(f"--patches is '{options.patches}'; expected two numbers, on P4 and on P3")
    return on_p4, on_p3[0]


def _check_used(options: argparse.Namespace, rows: list[Published]) -> None:
    """Raise ConfigError for an option that none of the networks looks at."""
    compared = [row.network in COMPARED for row in rows]
    if options.like is not None and not any(compared):
        raise ConfigError(f"--like is for {', '.join(COMPARED)}: name one of them, or leave it out")
    if options.patches is not None and all(compared):
        raise ConfigError("--patches is for ASAG, which alone probes: name a variant, or leave it out")


def _table(counts: list[dict[str, Any]]) -> list[TextRow]:
    parts = list(dict.fromkeys(part for count in counts for part in count["parts"]))
    rows: list[TextRow] = [("network", "queries", "shape", *parts, "GMACs", "paper", "off")]
    for count in counts:
        height, width = count["shape"]
        paper = count["paper"]
        rows.append(
            (
                count["network"],
                str(count["queries"]),
                f"{height}x{width}",
                *(_figure(count["parts"].get(part)) for part in parts),
                f"{count['gmacs']:.1f}",
                "-" if paper is None else f"{paper:g}",
                "-" if paper is None else f"{count['gmacs'] / paper - 1:+.1%}",
            )
        )
    return rows


def _figure(gmacs: float | None) -> str:
    return "-" if gmacs is None else f"{gmacs:.2f}"
