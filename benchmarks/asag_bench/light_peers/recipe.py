"""What decides a peer's training, as one value: the network, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError
from asag_training.data.transforms import Augmentation
from asag_training.network.config import AsagConfig
from asag_training.recipes import recipe
from asag_training.settings import Schedule, Settings

PeerName = Literal["yolox-lite", "d-fine-lite", "adamixer-6"]
PEER_NAMES: tuple[PeerName, ...] = get_args(PeerName)

SUMMARIES: dict[PeerName, str] = {
    "yolox-lite": "dense: head, losses and label assignment of YOLOX, with NMS",
    "d-fine-lite": "DETR-like: encoder, decoder, denoising and losses of D-FINE, by transformers",
    "adamixer-6": "six AdaMixer layers over learned queries, with its own neck",
}
"""What each peer is, in a few words."""

_RATES: dict[PeerName, float] = {"yolox-lite": 1e-3, "d-fine-lite": 5e-4, "adamixer-6": 5e-4}
_NORMS: dict[PeerName, float] = {"yolox-lite": 10.0, "d-fine-lite": 0.1, "adamixer-6": 0.1}
"""Of gradients: the dense one's own recipe does not clip them, the others' do."""


@dataclass(frozen=True, kw_only=True)
class PeerRecipe(Settings):
    """A whole training run of a peer but for its data and its seed.

    Raises ConfigError for a value that makes no sense.
    """

    of = "peer"
    peer: PeerName
    network: AsagConfig
    """The ASAG network whose backbone, width and classes the peer has."""
    augmentation: Augmentation
    preprocessing: Preprocessing
    """How images are resized for evaluation."""
    schedule: Schedule
    batch_size: int
    lr: float
    """Of AdamW, for all weights."""
    queries: int = 300
    """Of the DETR-like peers."""
    query_weighting: bool = False
    """Whether matched queries are weighed by score and IoU (paper, section 4.3; `adamixer-6` only)."""
    weight_decay: float = 1e-4
    max_gradient_norm: float

    def __post_init__(self) -> None:
        self._require(self.peer in PEER_NAMES, f"one of {', '.join(PEER_NAMES)}", "peer")
        for name in ("batch_size", "queries"):
            self._require(getattr(self, name) >= 1, "at least 1", name)
        for name in ("lr", "max_gradient_norm"):
            self._require(getattr(self, name) > 0, "above 0", name)
        self._require(self.weight_decay >= 0, "0 or more", "weight_decay")
        weighs = not self.query_weighting or self.peer == "adamixer-6"
        self._require(weighs, "false but for the peer adamixer-6", "query_weighting")


def peer_recipe(peer: str, like: str) -> PeerRecipe:
    """Return how a peer is trained beside the ASAG network of the recipe `like`.

    Backbone, width, classes, pictures, augmentation, batches and schedule are that recipe's.  Raises
    ConfigError for an unknown name, or for a recipe whose backbone does not start from random weights.
    """
    known = next((name for name in PEER_NAMES if name == peer), None)
    if known is None:
        raise ConfigError(f"unknown peer '{peer}'; those that can be trained are {', '.join(PEER_NAMES)}")
    of = recipe(like)
    if not of.optimisation.batch_statistics:
        raise ConfigError(
            f"the recipe '{like}' starts from ImageNet weights, peers start from random ones: take one such "
            "as scenes-lite or bccd-lite"
        )
    return PeerRecipe(
        peer=known,
        network=of.network,
        augmentation=of.augmentation,
        preprocessing=of.preprocessing,
        schedule=of.schedule,
        batch_size=of.optimisation.batch_size,
        lr=_RATES[known],
        max_gradient_norm=_NORMS[known],
    )


def stretched(schedule: Schedule, epochs: int) -> Schedule:
    """Return a schedule of another length, whose rate drops after the same shares of it."""
    drops = {round(drop * epochs / schedule.epochs) for drop in schedule.drops}
    inside = tuple(sorted(drop for drop in drops if 0 < drop < epochs))
    return schedule.with_changes(epochs=epochs, drops=inside)
