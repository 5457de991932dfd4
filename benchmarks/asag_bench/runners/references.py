"""References: what a bundle is timed beside in the same run.  PyTorch, and ways to go without early stops."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag_bench.runners.compared.published import COMPARED, IN_TORCH, is_compared, references
from asag_bench.runners.peers import PEERS, describe
from asag_bench.runners.runner import DetectorRunner, Run, Runner
from asag_deploy.backends.network import Network
from asag_deploy.backends.pieces import graphs_run_whole, why_no_pieces
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import FIRST_LEVEL, Level, Manifest, Precision, Preprocessing, Probing
from asag_deploy.cuda import why_no_cuda
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import BackendError, ConfigError
from asag_deploy.extras import missing
from asag_deploy.images.reading import RgbImage
from asag_deploy.kernels import LIBRARY_VARIABLE, cuda_library_path
from asag_deploy.loop.loop import LoopChoice
from asag_deploy.loop.stopping import StopRule, stop_rule
from asag_deploy.processing.preprocess import make_batch
from asag_deploy.scratch import scratch_folder
from asag_deploy.timing import since

if TYPE_CHECKING:
    from asag_bench.runners.torch_cuda import Interface
    from asag_training.checkpoints import Checkpoint
    from asag_training.network.stages import StageModule, TorchNetwork
    from asag_training.settings import WeightsChoice

PLAIN, COMPILED = "torch-eager-cuda", "torch-compile-cuda"
HOST_LOOP, DEVICE_LOOP = "torch-cuda", "torch-cuda-device"
ON_CUDA = {
    PLAIN: "the same network in PyTorch on an NVIDIA GPU, eager, with the loop as the public code has it",
    COMPILED: "the same network in PyTorch on an NVIDIA GPU, every stage through torch.compile",
    HOST_LOOP: "PyTorch's stages on an NVIDIA GPU as CUDA graphs with the compiled kernels, the host decides",
    DEVICE_LOOP: "the same stages as one CUDA graph that decides on the GPU",
}
"""References that run PyTorch on a GPU."""
REFERENCES = {
    "torch": "the same network in PyTorch, eager",
    "torch-bf16": "the same network in PyTorch, eager, under autocast to bfloat16",
    "torch-compile": "the same network in PyTorch, every stage through torch.compile",
    "unsplit": "the whole network as one graph without early stop, in the first backend",
    "always-probe": "the split loop, probing every level whether or not an anchor asks, in the first backend",
    "whole-graphs": "the split loop without the operators compiled for the CPU, in the first backend",
    "host-loop": "the split loop, the host taking every stop decision, in the first backend (TensorRT)",
    "device-loop": "the split loop as one CUDA graph, the GPU taking them, in the first backend (TensorRT)",
    **references(),
    **ON_CUDA,
    **{name: describe(peer) for name, peer in PEERS.items()},
}
_RECOMPILATIONS = 100
_LOOPS: dict[str, LoopChoice] = {"host-loop": "host", "device-loop": "device"}
_FROM_CHECKPOINTS = (
    "torch",
    "torch-bf16",
    "torch-compile",
    *(f"{IN_TORCH}{name}" for name in COMPARED),
    *ON_CUDA,
)

Rule = Callable[[Level | None], StopRule]


def check_references(names: Sequence[str], checkpoint: Path | None, manifest: Manifest) -> None:
    """Check that all references can be opened.

    A bundle that `asag-export --untrained` made has no checkpoint: its weights are drawn again.

    Raises ConfigError for a reference that does not exist or that lacks its checkpoint, BackendError for one
    that takes a GPU where there is none.
    """
    from asag_training.network.config import VARIANTS

    if checkpoint is not None and not {*_FROM_CHECKPOINTS, *COMPARED} & set(names):
        takes = ", ".join((*_FROM_CHECKPOINTS, *COMPARED))
        raise ConfigError(f"--checkpoint is for the references {takes}: give one of them, or leave it out")
    drawn_again = not manifest.trained and manifest.variant in VARIANTS
    for name in names:
        if name not in REFERENCES:
            raise ConfigError(f"unknown reference '{name}'; the references are {', '.join(REFERENCES)}")
        if name in _FROM_CHECKPOINTS and checkpoint is None and not drawn_again:
            raise ConfigError(
                f"the reference '{name}' needs the weights the bundle was exported from: "
                "give --checkpoint FILE"
            )
        if name in PEERS:
            _need("torch", "onnxscript", "transformers")
        if name in ON_CUDA:
            _need("torch", "onnxscript")
            check_cuda_reference(name)


def rule_of(manifest: Manifest, options: DetectorOptions) -> Rule:
    """Return how a bundle's probing stops, given a manual stop; the options' own stop holds as well.

    Raises ConfigError for options that make no sense with the bundle.
    """
    options.stop_rule(manifest)

    def rule(max_level: Level | None) -> StopRule:
        given = [level for level in (max_level, options.max_level) if level is not None]
        return stop_rule(manifest, options.mode, max(given, default=None))  # P5 comes before P3

    return rule


def open_reference(
    name: str,
    bundle: Bundle,
    network: Network,
    options: DetectorOptions,
    checkpoint: Path | None,
    weights: WeightsChoice = "model",
) -> Runner:
    """Open a reference that is no peer, ready to be timed.

    network: the bundle as the backend of `options` runs it; weights: which of the checkpoint's.

    Raises BackendError if the backend cannot run it, CheckpointError or ConfigError for a checkpoint that
    cannot be read or is another network, ConfigError for a loop on a backend that has only one.
    """
    manifest, deadline = bundle.manifest, options.deadline_ms
    rule = rule_of(manifest, options)
    if name == "always-probe":
        return DetectorRunner(name, manifest, network, _never_stops(rule), options.loop, deadline)
    if name in _LOOPS:
        if name == "host-loop" and network.why_no_device_loop() is not None:
            raise ConfigError(
                "the host takes every decision on this backend anyway, and the reference 'host-loop' would "
                "be the first runner once more: leave it out, or take a TensorRT backend, with the compiled "
                "kernels"
            )
        return DetectorRunner(name, manifest, network, rule, _LOOPS[name], deadline)
    if name == "whole-graphs":
        why = why_no_pieces()
        if why is not None:
            raise ConfigError(f"graphs run whole here anyway, as the reference 'whole-graphs' would: {why}")
        with graphs_run_whole():
            whole = options.open_network(bundle)
        return DetectorRunner(name, manifest, whole, rule, options.loop, deadline)
    if name == "unsplit":
        return _Unsplit(bundle, options)
    if name in COMPARED:
        return _compared(name, bundle, options, checkpoint, weights)
    if is_compared(name):
        return _compared_in_torch(name, bundle, options.threads, checkpoint, weights)
    loaded = _checkpoint(checkpoint, manifest, options.threads, weights)
    in_torch = open_on_cuda(name, loaded, manifest) if name in ON_CUDA else _torch_network(loaded, manifest)
    if name in ("torch-compile", COMPILED):
        _compile(in_torch)
    if name == "torch-bf16":
        _autocast(in_torch)
    loop: LoopChoice = "device" if name == DEVICE_LOOP else "host"
    return DetectorRunner(name, manifest, in_torch, rule, loop, deadline)


def _never_stops(rule: Rule) -> Rule:
    return lambda max_level: dataclasses.replace(rule(max_level), min_selected=0)


def _torch_network(checkpoint: Checkpoint, manifest: Manifest) -> TorchNetwork:
    """Build the checkpoint's network in PyTorch, with the bundle's pre-processing and levels."""
    from asag_training.network.model import build
    from asag_training.network.stage_plan import build_stages
    from asag_training.network.stages import TorchNetwork

    model = build(checkpoint.config, checkpoint.state)
    stages = build_stages(model, manifest.probing, checkpoint.head or "main", manifest.preprocessing)
    return TorchNetwork(stages)


def _compared(
    name: str, bundle: Bundle, options: DetectorOptions, path: Path | None, weights: WeightsChoice
) -> Runner:
    _need("torch", "onnxscript")
    from asag_bench.runners.compared.runner import open_compared

    checkpoint = None if path is None else _checkpoint(path, bundle.manifest, options.threads, weights)
    return open_compared(name, bundle, options, checkpoint)


def _compared_in_torch(
    name: str, bundle: Bundle, threads: int | None, path: Path | None, weights: WeightsChoice
) -> Runner:
    manifest = bundle.manifest
    checkpoint = _checkpoint(path, manifest, threads, weights)
    from asag_bench.runners.compared.map_stages import stage_of_maps
    from asag_bench.runners.compared.runner import ComparedRunner, build_compared, compared_config
    from asag_training.network.model import build
    from asag_training.network.stages import NormalizeStage, TorchNetwork

    detector = build_compared(name.removeprefix(IN_TORCH), compared_config(bundle, checkpoint))
    model = build(checkpoint.config, checkpoint.state)
    stages: list[StageModule] = [
        NormalizeStage(manifest.preprocessing),
        stage_of_maps(detector.maps, model),
        detector,
    ]
    return ComparedRunner(name, manifest, TorchNetwork([stage.eval() for stage in stages]))


def _checkpoint(
    path: Path | None, manifest: Manifest, threads: int | None, weights: WeightsChoice
) -> Checkpoint:
    """Load the checkpoint a bundle was exported from, of its head alone; PyTorch gets so many threads.

    Without a path, the weights that `asag-export --untrained` draws.
    """
    _need("torch")
    import torch

    from asag_training.checkpoints import load_checkpoint, select_head, untrained_checkpoint

    if threads is not None:
        torch.set_num_threads(threads)
    whole = untrained_checkpoint(manifest.variant) if path is None else load_checkpoint(path, weights=weights)
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
            absent = ModuleNotFoundError(f"No module named '{module}'", name=module)
            raise ConfigError(missing(absent, "asag-bench", purpose="this reference"))


def _compile(network: Network) -> None:
    """Compile each stage at its first call, for all sizes.

    What a guard depends on makes it compile again: a level, one patch or several, sizes that are equal.  From
    its limit on PyTorch would silently run the stage eagerly, so the limit is out of the way.
    """
    import torch
    import torch._dynamo.config

    from asag_training.network.stages import TorchNetwork

    torch._dynamo.config.recompile_limit = _RECOMPILATIONS
    if isinstance(network, TorchNetwork):
        modules: dict[str, Any] = network.modules
        for name, stage in modules.items():
            # The network asks a stage for its interface, which a compiled one passes on to the original.
            modules[name] = torch.compile(stage, dynamic=True)


def _autocast(network: Network) -> None:
    """Run each stage under autocast to bfloat16 on the CPU; features pass from stage to stage in it."""
    import torch

    from asag_training.network.stages import TorchNetwork

    assert isinstance(network, TorchNetwork)
    for stage in network.modules.values():
        stage.forward = torch.autocast("cpu", dtype=torch.bfloat16)(stage.forward)


def why_not_on_cuda(name: str) -> str | None:
    """Say what keeps a reference of `ON_CUDA` from running here, and what to do; None if nothing does.

    Raises BackendError if the variable that names the kernels names no file.
    """
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA; install a build with it from pytorch.org"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU on this machine; check with `nvidia-smi`"
    if name in (PLAIN, COMPILED):
        return None
    if cuda_library_path() is None:
        return (
            f"it takes the compiled kernels; build them as plugins/README.md says and set {LIBRARY_VARIABLE}"
        )
    problem = why_no_cuda()
    return None if problem is None else str(problem)


def check_cuda_reference(name: str) -> None:
    """Raise BackendError with one sentence if a reference of `ON_CUDA` cannot run here."""
    problem = why_not_on_cuda(name)
    if problem is not None:
        raise BackendError(f"the reference '{name}' runs on an NVIDIA GPU alone: {problem}")


def open_on_cuda(name: str, checkpoint: Checkpoint, manifest: Manifest) -> Network:
    """Open the network of a reference of `ON_CUDA`, from the checkpoint of one head.

    Raises BackendError if it cannot run here.
    """
    check_cuda_reference(name)
    open_it = open_with_kernels if name in (HOST_LOOP, DEVICE_LOOP) else open_plain
    precision: Precision = "fp16" if manifest.precision == "fp16" else "fp32"
    return open_it(checkpoint, manifest.probing, precision, manifest.preprocessing)


def open_plain(
    checkpoint: Checkpoint,
    probing: Probing,
    precision: Precision,
    preprocessing: Preprocessing | None = None,
) -> TorchNetwork:
    """Open the network in PyTorch as it is, on the GPU."""
    from asag_training.network.stages import TorchNetwork

    return TorchNetwork(modules_on_cuda(checkpoint, probing, precision, preprocessing), "cuda")


def open_with_kernels(
    checkpoint: Checkpoint,
    probing: Probing,
    precision: Precision,
    preprocessing: Preprocessing | None = None,
) -> EngineNetwork:
    """Open PyTorch's stages as a network of engines, with the compiled kernels.

    Besides the usual stages it has `pyramid`, backbone and neck alone.  Raises BackendError if CUDA or the
    kernels are missing here.
    """
    from asag_bench.runners.torch_cuda import open_torch_network

    modules = modules_on_cuda(checkpoint, probing, precision, preprocessing)
    return open_torch_network(*with_interfaces(modules, checkpoint, probing, precision))


def with_interfaces(
    modules: Sequence[StageModule], checkpoint: Checkpoint, probing: Probing, precision: Precision
) -> tuple[list[StageModule], list[Interface]]:
    """Return the stages and the pyramid alone, and what each of them takes and gives."""
    from asag_bench.runners.compared.map_stages import PyramidStage
    from asag_bench.runners.torch_cuda import interface_of
    from asag_export.stage_export import stage_inputs, stage_outputs
    from asag_training.network.stages import BackboneStage

    whole = next(module for module in modules if isinstance(module, BackboneStage))
    pyramid = PyramidStage(whole.model).eval()
    pyramid.name = "pyramid"
    all_of_them = [*modules, pyramid]
    given = (checkpoint.config, probing, precision)
    interfaces = [interface_of(stage_inputs(m, *given), stage_outputs(m, *given)) for m in all_of_them]
    return all_of_them, interfaces


def modules_on_cuda(
    checkpoint: Checkpoint,
    probing: Probing,
    precision: Precision,
    preprocessing: Preprocessing | None = None,
) -> list[StageModule]:
    """Build the stages on the GPU, BatchNorm folded, channels last; float32 is float32, never TF32."""
    import torch

    from asag_export.stage_export import prepare_for_export
    from asag_training.network.model import build
    from asag_training.network.stage_plan import build_stages

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = prepare_for_export(build(checkpoint.config, checkpoint.state), precision)
    stages: list[Any] = build_stages(model, probing, checkpoint.head or "main", preprocessing)
    # Of `Module.to` PyTorch's types do not say that it takes a memory format.
    return [stage.to("cuda", memory_format=torch.channels_last) for stage in stages]


class _Unsplit:
    """One graph from pixels to detections."""

    name = "unsplit"

    def __init__(self, bundle: Bundle, options: DetectorOptions) -> None:
        from asag_bench.runners.graphs import UNSPLIT, unsplit_bundle

        self._manifest = bundle.manifest
        with scratch_folder() as folder:
            whole = unsplit_bundle(bundle, folder)
            self._network = options.open_network(whole)
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
        return Run(total_ms=since(start), exits=(self._deepest,) * len(images))
