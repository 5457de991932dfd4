"""What a bundle is compared with in the same run: PyTorch, and ways to go without early stops."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag_bench.runners.subjects import DetectorSubject, Run, Subject
from asag_bench.runners.torch_cuda_peers import COMPILED, DEVICE_LOOP, ON_CUDA, check_cuda_peer, open_on_cuda
from asag_deploy.backends import open_network
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import FIRST_LEVEL, Level, Manifest, Mode
from asag_deploy.errors import ConfigError
from asag_deploy.images.reading import RgbImage
from asag_deploy.loop.loop import LoopChoice
from asag_deploy.loop.stopping import StopRule, stop_rule
from asag_deploy.processing.preprocess import make_batch

if TYPE_CHECKING:
    from asag_training.checkpoints import Checkpoint
    from asag_training.network.stages import TorchNetwork

SIX_LAYERS = ("adamixer-6", "sparse-rcnn-6")
PEERS = {
    "torch": "the same network in PyTorch, eager",
    "torch-compile": "the same network in PyTorch, every stage through torch.compile",
    "unsplit": "the whole network as one graph without early stop, in the first backend",
    "always-probe": "the split loop, probing every level whether or not an anchor asks, in the first backend",
    "host-loop": "the split loop, the host taking every stop decision, in the first backend",
    "device-loop": "the split loop as one CUDA graph that takes them on the GPU, in the first backend",
    "adamixer-6": "six AdaMixer layers over learned queries, random weights, in the first backend",
    "sparse-rcnn-6": "six Sparse R-CNN layers over learned queries, random weights, in the first backend",
    "torch-adamixer-6": "the six AdaMixer layers in PyTorch, eager",
    "torch-sparse-rcnn-6": "the six Sparse R-CNN layers in PyTorch, eager",
    **ON_CUDA,
}
_LOOPS: dict[str, LoopChoice] = {"host-loop": "host", "device-loop": "device"}
_IN_TORCH = "torch-"
_FROM_CHECKPOINTS = ("torch", "torch-compile", *(f"{_IN_TORCH}{name}" for name in SIX_LAYERS), *ON_CUDA)

Rule = Callable[[Level | None], StopRule]


def check_peers(peers: Sequence[str], checkpoint: Path | None, manifest: Manifest) -> None:
    """Raise ConfigError for a peer that does not exist or that lacks its checkpoint, BackendError for one
    that takes a GPU where there is none.

    A bundle that `asag-export --untrained` made has none: its weights are drawn again.
    """
    from asag_training.network.config import VARIANTS

    drawn_again = not manifest.trained and manifest.variant in VARIANTS
    for peer in peers:
        if peer not in PEERS:
            raise ConfigError(f"unknown peer '{peer}'; the peers are {', '.join(PEERS)}")
        if peer in _FROM_CHECKPOINTS and checkpoint is None and not drawn_again:
            raise ConfigError(
                f"the peer '{peer}' needs the weights the bundle was exported from: give --checkpoint FILE"
            )
        if peer in ON_CUDA:
            _need("torch", "onnxscript")
            check_cuda_peer(peer)


def is_random(peer: str) -> bool:
    """Whether a peer's weights are random, so that only its speed means anything."""
    return peer.removeprefix(_IN_TORCH) in SIX_LAYERS


def rule_of(manifest: Manifest, mode: Mode | None) -> Rule:
    """How a bundle's probing stops, given the manual stop."""
    return lambda max_level: stop_rule(manifest, mode, max_level)


def open_peer(
    peer: str,
    bundle: Bundle,
    *,
    network: Network,
    backend: str | None,
    mode: Mode | None,
    threads: int | None,
    checkpoint: Path | None,
) -> Subject:
    """A peer, ready to be timed; `network` is the bundle as the first backend runs it.

    Raises BackendError if the backend cannot run it, CheckpointError or ConfigError for a checkpoint that
    cannot be read or is another network.
    """
    rule = rule_of(bundle.manifest, mode)
    if peer == "always-probe":
        return DetectorSubject(peer, bundle.manifest, network, _never_stops(rule))
    if peer in _LOOPS:
        return DetectorSubject(peer, bundle.manifest, network, rule, _LOOPS[peer])
    if peer == "unsplit":
        return _Unsplit(bundle, backend, threads)
    if peer in SIX_LAYERS:
        return _six_layers(peer, bundle, backend, threads, checkpoint)
    if is_random(peer):
        return _six_layers_in_torch(peer, bundle, threads, checkpoint)
    if peer in ON_CUDA:
        return _on_cuda(peer, bundle, rule, threads, checkpoint)
    torch_network = _torch_network(checkpoint, bundle.manifest, threads)
    if peer == "torch-compile":
        _compile(torch_network)
    return DetectorSubject(peer, bundle.manifest, torch_network, rule)


def _never_stops(rule: Rule) -> Rule:
    return lambda max_level: dataclasses.replace(rule(max_level), min_selected=0)


def _torch_network(path: Path | None, manifest: Manifest, threads: int | None) -> TorchNetwork:
    """The bundle's checkpoint as PyTorch runs it, after the same pre-processing and up to the same level."""
    checkpoint = _checkpoint(path, manifest, threads)
    from asag_training.network.model import build
    from asag_training.network.stage_plan import build_stages
    from asag_training.network.stages import TorchNetwork

    model = build(checkpoint.config, checkpoint.state)
    stages = build_stages(model, manifest.probing, checkpoint.head or "main", manifest.preprocessing)
    return TorchNetwork(stages)


def _on_cuda(peer: str, bundle: Bundle, rule: Rule, threads: int | None, path: Path | None) -> Subject:
    from asag_training.network.stages import TorchNetwork

    network = open_on_cuda(peer, _checkpoint(path, bundle.manifest, threads), bundle.manifest)
    if peer == COMPILED and isinstance(network, TorchNetwork):
        _compile(network)
    return DetectorSubject(peer, bundle.manifest, network, rule, "device" if peer == DEVICE_LOOP else "host")


def _six_layers(
    peer: str, bundle: Bundle, backend: str | None, threads: int | None, path: Path | None
) -> Subject:
    _need("torch", "onnxscript")
    from asag_bench.runners.six_layers import open_six_layers

    checkpoint = None if path is None else _checkpoint(path, bundle.manifest, threads)
    return open_six_layers(peer, bundle, backend, threads, checkpoint)


def _six_layers_in_torch(peer: str, bundle: Bundle, threads: int | None, path: Path | None) -> Subject:
    manifest = bundle.manifest
    checkpoint = _checkpoint(path, manifest, threads)
    from asag_bench.runners import six_layers
    from asag_training.network.model import build
    from asag_training.network.stages import NormalizeStage, StageModule, TorchNetwork

    decoder = six_layers.DECODERS[peer.removeprefix(_IN_TORCH)]
    config = six_layers.six_layer_config(decoder, bundle, checkpoint)
    model = build(checkpoint.config, checkpoint.state)
    stages: list[StageModule] = [
        NormalizeStage(manifest.preprocessing),
        six_layers.PyramidStage(model),
        six_layers.six_layer_decoder(config),
    ]
    return six_layers.SixLayers(peer, manifest, TorchNetwork([stage.eval() for stage in stages]))


def _checkpoint(path: Path | None, manifest: Manifest, threads: int | None) -> Checkpoint:
    """The checkpoint a bundle was exported from, and its head; PyTorch gets so many threads.

    Without a path, the weights that `asag-export --untrained` draws.
    """
    _need("torch")
    import torch

    from asag_training.checkpoints import load_checkpoint, select_head, untrained_checkpoint

    if threads is not None:
        torch.set_num_threads(threads)
    whole = untrained_checkpoint(manifest.variant) if path is None else load_checkpoint(path)
    checkpoint = select_head(whole, manifest.head)
    if checkpoint.config.variant != manifest.variant:
        raise ConfigError(
            f"'{path}' holds {checkpoint.config.variant}, but the bundle {manifest.variant}; "
            "give the checkpoint that the bundle was exported from"
        )
    return checkpoint


def _need(*modules: str) -> None:
    """Raise ConfigError for what is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"this peer needs {module}: install it with `pip install 'asag-deploy[bench]'`")


def _compile(network: TorchNetwork) -> None:
    import torch

    modules: dict[str, Any] = network.modules
    for name, stage in modules.items():
        compiled = torch.compile(stage, dynamic=True)
        # The network asks a stage for its interface, which a compiled one passes on to the original.
        modules[name] = compiled


class _Unsplit:
    """One graph from pixels to detections."""

    name = "unsplit"

    def __init__(self, bundle: Bundle, backend: str | None, threads: int | None) -> None:
        from asag_bench.runners.graphs import UNSPLIT, unsplit_bundle

        self._manifest = bundle.manifest
        with tempfile.TemporaryDirectory() as folder:
            self._network = open_network(backend, unsplit_bundle(bundle, Path(folder)), threads)
        self._stage = self._network.stage(UNSPLIT)
        levels: list[Level] = [FIRST_LEVEL, *(level.level for level in bundle.manifest.probing.levels)]
        self._deepest = levels[-1]

    def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
        """Detect in a batch of RGB images, always to the deepest level."""
        start = time.perf_counter()
        pixels, sizes = make_batch(images, self._manifest.preprocessing)
        given = {"pixels": self._network.upload(pixels), "image_size": self._network.upload(sizes)}
        outputs = self._stage(given)
        shapes = [(image.shape[0], image.shape[1]) for image in images]
        self._network.processing(self._manifest).begin_decode(outputs, shapes)()
        total = (time.perf_counter() - start) * 1000
        return Run(total_ms=total, exits=(self._deepest,) * len(images))
