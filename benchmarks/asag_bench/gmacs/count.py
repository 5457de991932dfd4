"""Count multiply-accumulates: those of convolutions and matrix products, as publications do.

What samples, normalises or chooses is not counted.  Nothing is computed: the networks run on PyTorch's device
`meta`, on which tensors have shapes and no numbers, so that any size takes no time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from asag_bench.runners.compared.map_stages import stage_of_maps
from asag_bench.runners.compared.runner import BUILDERS
from asag_training.network.config import AsagConfig
from asag_training.network.model import Asag
from asag_training.network.pyramid import map_of

_META = torch.device("meta")
_LEVELS = ("P4", "P3")
_GIGA = 1e9
_LEAST = 1e-3
"""GMACs under which a part is not worth a column."""


def count_asag(
    config: AsagConfig, shape: tuple[int, int], queries: int, patches: tuple[int, int]
) -> dict[str, float]:
    """Count the GMACs of each part of ASAG's inference on one image.

    shape: height and width in pixels; queries: anchors that reach the decoder; patches: probed on P4 and P3.
    """
    with _META:
        model = Asag(config).eval().requires_grad_(False)
        image, image_size = _picture(shape)
        anchors = torch.zeros(1, queries, 4)
        valid = torch.ones(1, queries, dtype=torch.bool)
    parts: dict[str, float] = {}

    def part(name: str, run: Callable[[], Any]) -> Any:
        parts[name], made = _counted(run)
        return made

    maps = part("backbone", lambda: model.backbone(image))
    features = part("neck", lambda: [p.permute(0, 2, 3, 1) for p in model.neck(maps)])
    if model.encoder is not None:
        encoder, canvas = model.encoder, shape
        of_neck = features
        features = part("encoder", lambda: encoder(of_neck, image_size, canvas))
    p5 = map_of("P5", features, config)
    generator = model.anchor_generator
    part("first level", lambda: generator.first_level(p5, image_size))
    for level, count in zip(_LEVELS, patches, strict=True):
        feature = map_of(level, features, config)
        if count:
            part(f"probe {level}", functools.partial(_probe, model, level, feature, image_size, count))
    proposals, blocked = part("relation block", lambda: model.relate(features, anchors, valid, image_size))
    head = config.head_names[-1]
    part("decoder", lambda: model.decode(head, features, proposals, blocked, image_size))
    return parts


def _probe(model: Asag, level: str, feature: Tensor, image_size: Tensor, patches: int) -> Any:
    size = torch.tensor(feature.shape[1:3], device=_META)
    origins = torch.zeros(1, patches, 2, dtype=torch.int64)
    counts = torch.zeros(1, dtype=torch.int64)
    return model.anchor_generator.probe(level, feature, size, image_size, origins, counts)


def count_compared(name: str, config: AsagConfig, shape: tuple[int, int], queries: int) -> dict[str, float]:
    """Count the GMACs of each part of one of the paper's other detectors on one image.

    config: the network whose backbone and width it has; otherwise as `count_asag`.
    """
    with _META:
        detector = BUILDERS[name](config, queries).eval().requires_grad_(False)
        model = Asag(detector.config).eval().requires_grad_(False)
        image, image_size = _picture(shape)
    stage = stage_of_maps(detector.maps, model)
    total, maps = _counted(lambda: stage(image, image_size))
    backbone, _ = _counted(lambda: model.backbone(image))
    parts = {"backbone": backbone, "neck": total - backbone}
    counter, _ = _run(lambda: detector(*maps, image_size))
    counts = counter.get_flop_counts()
    root = type(detector).__name__
    for module, of_module in counts.items():
        names = module.split(".")
        # A list of modules is never called itself: its members are counted by themselves.
        above = [".".join(names[:i]) for i in range(2, len(names))]
        if names[0] == root and len(names) > 1 and not counts.keys() & above:
            parts[names[1]] = parts.get(names[1], 0.0) + _gmacs(sum(of_module.values()))
    return {part: gmacs for part, gmacs in parts.items() if gmacs > _LEAST}


def _picture(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    height, width = shape
    return torch.zeros(1, 3, height, width), torch.zeros(1, 2, dtype=torch.int64)


def _counted(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the GMACs of what `run` does, and what it returns."""
    counter, made = _run(run)
    return _gmacs(counter.get_total_flops()), made


def _run(run: Callable[[], Any]) -> tuple[FlopCounterMode, Any]:
    with _META, torch.no_grad(), FlopCounterMode(display=False) as counter:
        made = run()
    return counter, made


def _gmacs(flops: float) -> float:
    """Turn operations, of which PyTorch counts two for each multiply-accumulate, into GMACs."""
    return flops / 2 / _GIGA
