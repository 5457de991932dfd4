"""The stages of a network, and the parameters of the runtime's loop over them."""

from __future__ import annotations

from asag_deploy.bundle.manifest import Mode, Postprocessing, Preprocessing, ProbeLevel, Probing
from asag_deploy.errors import ConfigError
from asag_training.network.anchor_generator import STRIDES
from asag_training.network.config import MAIN_HEAD, MANUAL_STOPS, AsagConfig
from asag_training.network.model import Asag
from asag_training.network.stages import BackboneStage, DecoderStage, NormalizeStage, ProbeStage, StageModule

_EXACT_CAPACITY = {"P4": 128, "P3": 256}
_FAST_CAPACITY = 15
_MAX_CANDIDATES = 2048


def probing_plan(config: AsagConfig, levels: str = "p3-p6", mode: Mode = "exact") -> Probing:
    """Return the parameters of the probing loop (ConfigError for an unknown manual stop or mode)."""
    if levels not in MANUAL_STOPS:
        raise ConfigError(f"unknown levels '{levels}'; choose one of {', '.join(MANUAL_STOPS)}")
    if mode not in ("exact", "fast"):
        raise ConfigError(f"unknown mode '{mode}'; choose exact or fast")
    capacity = dict.fromkeys(_EXACT_CAPACITY, _FAST_CAPACITY) if mode == "fast" else _EXACT_CAPACITY
    return Probing(
        mode=mode,
        patch_size=config.patch_size,
        levels=tuple(
            ProbeLevel(
                level=level,
                stride=STRIDES[level],
                capacity=min(capacity[level], config.max_patches or capacity[level]),
                anchors_per_patch=config.patch_anchors,
            )
            for level in MANUAL_STOPS[levels]
        ),
        max_candidates=_MAX_CANDIDATES,
        patch_nms_iou=config.patch_nms_iou,
        anchor_floor=config.anchor_floor,
        anchor_cap=config.anchor_cap,
        max_patches=config.max_patches,
        cap_can_be_lowered=True,
    )


def postprocessing_plan(config: AsagConfig) -> Postprocessing:
    """Return how the decoder's outputs become detections."""
    return Postprocessing(max_detections=config.detection_limit, nms_iou=config.detection_nms_iou)


def build_stages(
    model: Asag, probing: Probing, head: str = MAIN_HEAD, preprocessing: Preprocessing | None = None
) -> list[StageModule]:
    """Build the stages of `model` in the order they run."""
    levels = [level.level for level in probing.levels]
    first, *following = [*levels, None]
    stages: list[StageModule] = [
        NormalizeStage(preprocessing or Preprocessing()),
        BackboneStage(model, first),
    ]
    for level, after in zip(levels, following, strict=True):
        stages.append(ProbeStage(model, level, after))
    stages.append(DecoderStage(model, head, levels))
    return [stage.eval() for stage in stages]
