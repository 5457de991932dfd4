"""The settings of the losses."""

from __future__ import annotations

from dataclasses import dataclass, field

from asag_training.settings import Settings


@dataclass(frozen=True, kw_only=True)
class MatchingCosts(Settings):
    """Weights of the parts of the matching cost (ConfigError for a negative one, or when all are 0)."""

    of = "matching"
    classes: float = 2.0
    l1: float = 5.0
    giou: float = 2.0

    def __post_init__(self) -> None:
        parts = (self.classes, self.l1, self.giou)
        possible = min(parts) >= 0 and max(parts) > 0
        self._require(possible, "none below 0 and one above", "classes", "l1", "giou")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Settings):
    """Everything that decides what training minimises (ConfigError for values that make no sense)."""

    of = "loss"
    ce: float = 2.0
    """Weight of the classification losses of relation block, decoders and denoising."""
    l1: float = 5.0
    """Weight of their L1 box losses."""
    giou: float = 2.0
    """Weight of their GIoU losses."""
    anchor_ce: float = 8.0
    """Weight of the anchors' score loss."""
    anchor_l1: float = 4.0
    """Weight of the anchors' L1 box loss."""
    anchor_giou: float = 2.0
    """Weight of the anchors' GIoU loss."""
    matching: MatchingCosts = field(default_factory=MatchingCosts)
    """Weights of the matching cost."""
    query_weighting: bool = True
    """Weigh matched queries by score and IoU (paper, section 4.3).  Without it queries are classified with
    focal loss (alpha 0.25, gamma 2), and all boxes count alike."""
    gamma1: float = 0.4
    """Exponent of the class score in Query Weighting."""
    gamma2: float = 0.6
    """Exponent of the IoU in Query Weighting."""
    area_weight: float = 4.0
    """What the smallest objects count for, the largest counting 1; the reverse on P6.  1 turns it off."""
    ignore_iou: float = 0.5
    """Unmatched anchors that overlap an object this much are not taught to score low."""
    patch_images: float | None = None
    """The losses of P4 and P3 are multiplied by 4 / (patches per image x this); None: by the images of one
    rank's batch, as published.  A number makes them independent of how images are spread over ranks."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():  # every weight and exponent; some are held to more below
            if isinstance(value, int | float):
                self._require(value >= 0, "0 or more", name)
        self._require(self.area_weight >= 1, "1 or more", "area_weight")
        self._require(0 < self.ignore_iou <= 1, "above 0, at most 1", "ignore_iou")
        self._require(self.patch_images is None or self.patch_images > 0, "above 0, or None", "patch_images")
