"""A peer as a network that learns, and what is kept of one: its recipe, its classes and its weights."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from asag_bench.light_peers.dense import DenseDetector
from asag_bench.light_peers.dense_losses import dense_losses
from asag_bench.light_peers.detr import DetrDetector
from asag_bench.light_peers.recipe import PeerRecipe
from asag_bench.light_peers.six_layers import AdaMixerDetector
from asag_deploy.atomic import atomic_write
from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import CheckpointError, FieldError, plural
from asag_deploy.typed_json import read_fields
from asag_training.data.loading import Batch
from asag_training.run.state import is_of_asag_train, position_in

RECIPE, WEIGHTS = "recipe.json", "peer.safetensors"

PeerNetwork = DenseDetector | DetrDetector | AdaMixerDetector


@dataclass(frozen=True, kw_only=True)
class Said:
    """What stands in a peer's `recipe.json`."""

    recipe: PeerRecipe
    categories: tuple[Category, ...]
    seed: int

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class TrainedPeer:
    """A peer that has been trained, or is being."""

    said: Said
    network: PeerNetwork


def build(recipe: PeerRecipe, seed: int) -> PeerNetwork:
    """Build a peer's network with random weights (ConfigError where a library is missing)."""
    torch.manual_seed(seed)
    if recipe.peer == "yolox-lite":
        return DenseDetector(recipe.network)
    if recipe.peer == "adamixer-6":
        given = (recipe.network, recipe.queries)
        return AdaMixerDetector(*given, query_weighting=recipe.query_weighting)
    return DetrDetector(recipe.network, recipe.queries)


def losses_of(network: PeerNetwork, batch: Batch) -> dict[str, Tensor]:
    """Return the losses of a batch by name, weighted, to be added up."""
    if isinstance(network, DenseDetector):
        return dense_losses(network(batch.image), batch.targets, batch.image_size)
    return network.losses(batch.image, batch.targets, batch.image_size)


def save_weights(network: nn.Module, folder: Path) -> None:
    """Write `peer.safetensors`, wholly or not at all (OutputError if it cannot be written)."""
    state = {name: tensor.detach().contiguous() for name, tensor in _state(network).items()}
    with atomic_write(folder / WEIGHTS) as unfinished:
        unfinished.write_bytes(save(state))


def load_peer(folder: Path) -> TrainedPeer:
    """Load the peer that `asag-bench train-peer` has left in a folder (CheckpointError if it is damaged)."""
    said = read_said(folder)
    network = build(said.recipe, said.seed)
    try:
        missing, unknown = network.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        missing = [name for name in missing if name in _state(network)]
        if missing or unknown:
            raise ValueError(f"it has no {(missing or unknown)[0]}")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"'{folder}' holds no {WEIGHTS}: train the peer first, with `asag-bench train-peer`"
        ) from error
    except Exception as error:  # of a damaged file anything comes
        raise CheckpointError(f"'{folder / WEIGHTS}' is damaged ({error}): train the peer anew") from error
    return TrainedPeer(said=said, network=network.eval().requires_grad_(False))


def read_said(folder: Path) -> Said:
    """Read a peer's `recipe.json` (CheckpointError if it is none)."""
    path = folder / RECIPE
    try:
        content: Any = json.loads(path.read_bytes())
        if is_of_asag_train(content):
            raise CheckpointError(
                f"'{folder}' is a run of asag-train, no peer's: give the --output-dir of `asag-bench "
                "train-peer`; what asag-train trains, asag-eval measures, and, once it is exported, "
                "`asag-bench front --bundle`"
            )
        said: Said = read_fields(Said, content)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"'{folder}' holds no {RECIPE} of a peer: give the --output-dir of `asag-bench train-peer`"
        ) from error
    except (OSError, ValueError, RecursionError, FieldError) as error:
        raise CheckpointError(f"'{path}' is not a peer's ({error}): train the peer anew") from error
    return said


def unfinished(folder: Path, epochs: int) -> str | None:
    """Return in words how far a run of so many epochs has come, and warn of it, if that is not its end.

    None if it is, or where nothing tells.
    """
    position = position_in(folder)
    if position is None or position.epoch >= epochs:
        return None
    found = f"{position.epoch} of {plural(epochs, 'epoch', 'epochs')}"
    warnings.warn(
        f"the run in '{folder}' is not at its end: it has done {found} ({plural(position.step, 'update')})",
        RuntimeWarning,
        stacklevel=2,
    )
    return found


def _state(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights by name, each once: `transformers` gives some of them two names."""
    seen: set[int] = set()
    state = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state
