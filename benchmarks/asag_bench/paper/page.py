"""What stands over the tables: on what they were measured, where, and what the paper's numbers are of."""

from __future__ import annotations

import torch

from asag_bench.paper.measuring import Measurer
from asag_deploy.errors import plural
from asag_evaluation.data.coco import COCO_CATEGORIES

_COCO_VAL = 5000


def header(measurer: Measurer) -> list[str]:
    """Return a few lines on data, networks, machine and versions."""
    dataset, machine, given = measurer.dataset, measurer.machine, measurer.given
    objects = sum(len(record.boxes) for record in dataset.records)
    is_coco = dataset.categories == COCO_CATEGORIES and len(dataset) == _COCO_VAL
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    whose = [
        f"{role}: {network.config.variant}{'' if network.trained else ' (random weights)'}"
        for role, network in measurer.networks.items()
    ]
    whose += [
        f"{role}: {said.recipe.peer} beside {said.recipe.network.variant}"
        for role, said in measurer.peers.items()
    ]
    counts = f"{plural(len(dataset), 'image')}, {plural(objects, 'object')}"
    data = f"{given.data.resolve().name} {given.split}, {counts}"
    threads = plural(torch.get_num_threads(), "thread")
    on = f"{machine.processor}, {plural(machine.cores, 'core')}, PyTorch with {threads}"
    lines = [
        f"Here: {data}, {plural(len(dataset.categories), 'class')}.",
        f"Networks: {'; '.join(whose) or 'none'}.",
        f"Measured on {machine.date}, {on}; {versions}.",
        "In brackets: the paper's numbers, of COCO val2017; its images a second (FPS) of an RTX 3090.",
        "F: billions of multiply-accumulates on the mean image.",
        "FPS here: one image at a time, from memory, in fast mode, as the paper times.",
    ]
    if not is_coco:
        lines.append("To compare AP with the paper's, COCO val2017 and networks trained on COCO are needed.")
    return lines
