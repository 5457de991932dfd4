"""A checkpoint, or a network in memory, as a `Predictor`: measured by the same code as bundles.

PyTorch is one more backend: the stages of a network run under the loop that bundles run under.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from asag_deploy import __version__
from asag_deploy.bundle.manifest import Category, Manifest, Preprocessing
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_evaluation.predictor import Predictor, proposing_predictor
from asag_training.checkpoints import Checkpoint, load_checkpoint, select_head
from asag_training.checkpoints.published import about_heads
from asag_training.evaluation.device import check_device
from asag_training.network.config import MAIN_HEAD
from asag_training.network.model import Asag, build
from asag_training.network.stage_plan import build_stages, postprocessing_plan, probing_plan
from asag_training.network.stages import TorchNetwork
from asag_training.settings import WeightsChoice, change_sides


def checkpoint_predictor(
    path: Path,
    options: DetectorOptions | None = None,
    *,
    device: str = "cpu",
    **reading: Any,
) -> Predictor:
    """Load a checkpoint's file.

    options: their backend, threads and requests are not looked at.  reading: see `evaluated_checkpoint`.
    Raises CheckpointError, and ConfigError for an unknown head, mode, level or device.
    """
    check_device(device)
    checkpoint = evaluated_checkpoint(path, **reading)
    return network_predictor(
        build(checkpoint.config, checkpoint.state),
        checkpoint.categories,
        options,
        preprocessing=checkpoint.preprocessing,
        trained=checkpoint.trained,
        device=device,
    )


def evaluated_checkpoint(
    path: Path,
    *,
    head: str | None = None,
    weights: WeightsChoice = "model",
    preprocessing: Preprocessing | None = None,
    shorter_side: int | None = None,
    longer_side: int | None = None,
    classes: Callable[[], Sequence[Category]] | None = None,
    note: Callable[[str], object] = lambda sentence: None,
) -> Checkpoint:
    """Load a checkpoint's file as it is to be measured: with one decoder, and with its pre-processing.

    head: one of the parallel decoders; None for the main one.  weights: see `load_checkpoint`.
    preprocessing: None for what the file says, if it does.  shorter_side, longer_side: in pixels, instead of
    those in it, of which all else stays.  classes: asked for those of the data where the file names none;
    they are taken if they are as many.  note: told in sentences what was taken and assumed.
    Raises CheckpointError, and ConfigError for an unknown head.
    """
    checkpoint = load_checkpoint(path, weights=weights)
    for sentence in (*checkpoint.notes, *about_heads(path, checkpoint, head), *checkpoint.assumed):
        note(sentence)
    if not checkpoint.named and classes is not None:
        found = tuple(classes())
        if len(found) == checkpoint.config.num_classes:
            checkpoint = dataclasses.replace(checkpoint, categories=found)
            one = "its class is taken for that of the data"
            several = f"its {len(found)} classes are taken for those of the data, in the order of their ids"
            note(one if len(found) == 1 else several)
    said = preprocessing or checkpoint.prepared
    checkpoint = dataclasses.replace(checkpoint, preprocessing=change_sides(said, shorter_side, longer_side))
    return select_head(checkpoint, head or checkpoint.head_names[-1])


def network_predictor(
    model: Asag,
    categories: Sequence[Category],
    options: DetectorOptions | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    trained: bool = True,
    device: torch.device | str = "cpu",
) -> Predictor:
    """Take a network, with its main decoder, as it is in memory.

    A trainer must call `model.train()` again when it goes on.  Raises ConfigError for an unknown mode or
    level.
    """
    chosen = options or DetectorOptions()
    preprocessing = preprocessing or Preprocessing()
    probing = probing_plan(model.config, mode=chosen.mode or "exact")
    stages = [stage.to(device) for stage in build_stages(model, probing, MAIN_HEAD, preprocessing)]
    manifest = Manifest(
        producer=f"asag-deploy {__version__}",
        variant=model.config.variant,
        head=MAIN_HEAD,
        precision="fp32",
        opset=0,
        trained=trained,
        categories=tuple(categories),
        preprocessing=preprocessing,
        probing=probing,
        postprocessing=postprocessing_plan(model.config),
        graphs=(),
    )
    for name, asked, most in (
        ("anchor_cap", chosen.anchor_cap, model.config.anchor_cap),
        ("max_detections", chosen.max_detections, model.config.detection_limit),
    ):
        if asked is not None and asked > most:  # a network that is not exported can be given more
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} is {asked}, and the network's settings allow {most}; give --set {name}={asked}"
            )
    rule = chosen.stop_rule(manifest)
    name = f"{model.config.variant} (torch)"
    return proposing_predictor(manifest, TorchNetwork(stages, device), rule, chosen, name=name)
