"""A front in words and figures: a table to read, and one for other programs."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from statistics import fmean

from asag_bench.front.result import Contender, Front
from asag_bench.light_peers.evaluation import DETECTIONS
from asag_deploy.errors import plural


def csv_text(front: Front) -> str:
    """Return a row for each picture and contender: its objects, how long it took, and where probing
    stopped."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("image_id", "objects", "kind", "network", "weights", "backend", "stop", "ms", "exit"))
    pictures = front.pictures
    for each in front.contenders:
        for i, image_id in enumerate(pictures.ids):
            level = each.exits[i] if each.exits else ""
            row = (image_id, pictures.objects[i], pictures.kinds[i] or "", each.network, each.weights)
            writer.writerow((*row, each.backend, each.stop or "", each.ms[i], level))
    return buffer.getvalue()


def markdown(front: Front) -> str:
    """Return the page of a front: the networks, averaged over their seeds, and what deciding gained."""
    machine, pictures = front.machine, front.pictures
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    rounds = plural(front.rounds, "round")
    cores, most = plural(machine.cores, "core"), plural(max(pictures.objects), "object")
    lines = [
        f"# AP against time: {pictures.data}",
        "",
        f"`{front.command}`",
        "",
        f"- {machine.processor}, {cores}, {in_threads(front.threads)}, {machine.date}",
        f"- {packages}",
        *([] if machine.operators_in_words is None else [f"- {machine.operators_in_words}"]),
        f"- {plural(len(pictures.ids), 'picture')} with {min(pictures.objects)} to {most}",
        f"- one picture at a time, {rounds}; a picture's time is the median of its rounds",
        f"- AP counts {DETECTIONS} detections a picture; of several seeds means, and least to most",
        "",
        "| network | backend | stop | seeds | AP | AP50 | AP75 | median ms | mean ms | stop before P3 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group in _groups(front).values():
        one = group[0]
        cells = (
            one.network,
            one.backend,
            one.stop or "-",
            str(len(group)),
            _spread([each.ap for each in group]),
            _spread([each.ap50 for each in group]),
            _spread([each.ap75 for each in group]),
            f"{fmean(each.median_ms for each in group):.2f}",
            f"{fmean(each.mean_ms for each in group):.2f}",
            _stopped(group),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_adaptivity(front), *_trainings(front)])


def in_threads(threads: int | None) -> str:
    """Say how many threads something ran in; None is the backend's choice."""
    return "the backend's threads" if threads is None else plural(threads, "thread")


def _adaptivity(front: Front) -> list[str]:
    lines = [
        "| weights | backend | going to P3 costs, over P5 | stop before P3 | these save, over going to P3 |",
        "| --- | --- | --- | --- | --- |",
    ]
    found = front.adaptivity()
    for each in found:
        shares = (_percent(each.probing_costs), _percent(each.stopped), _percent(each.saved))
        lines.append(f"| {each.weights} | {each.backend} | {' | '.join(shares)} |")
    return [*lines, ""] if found else []


def _trainings(front: Front) -> list[str]:
    lines = [
        "| weights | network | seed | updates | pictures seen | CPU minutes of training |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    seen: set[str] = set()
    for each in front.contenders:
        if each.training is not None and each.weights not in seen:
            seen.add(each.weights)
            of = each.training
            updates = f"{of.updates} ({of.unfinished})" if of.unfinished else of.updates
            cells = (of.seed, updates, of.images, f"{of.cpu_minutes:.1f}")
            lines.append(f"| {each.weights} | {each.network} | {' | '.join(map(str, cells))} |")
    return [*lines, ""] if seen else []


def _groups(front: Front) -> dict[tuple[str, str, str | None], list[Contender]]:
    groups = defaultdict(list)
    for each in front.contenders:
        groups[each.network, each.backend, each.stop].append(each)
    return groups


def _spread(values: list[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{fmean(known):.1f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.1f} to {max(known):.1f})"


def _stopped(group: list[Contender]) -> str:
    exits = [level for each in group for level in each.exits or ()]
    return _percent(sum(level != "P3" for level in exits) / len(exits)) if exits else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"
