"""A bundle's checkpoint in PyTorch on an NVIDIA GPU: as others run it, and with this project's loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from asag_deploy.backends.network import Network
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.manifest import Manifest, Precision, Preprocessing, Probing
from asag_deploy.cuda import why_no_cuda
from asag_deploy.errors import BackendError
from asag_deploy.kernels import LIBRARY_VARIABLE, cuda_library_path

if TYPE_CHECKING:
    from asag_bench.runners.torch_cuda import Interface
    from asag_training.checkpoints import Checkpoint
    from asag_training.network.stages import StageModule, TorchNetwork

PLAIN, COMPILED = "torch-eager-cuda", "torch-compile-cuda"
HOST_LOOP, DEVICE_LOOP = "torch-cuda", "torch-cuda-device"
ON_CUDA = {
    PLAIN: "the same network in PyTorch on an NVIDIA GPU, eager, with the loop as the public code has it",
    COMPILED: "the same network in PyTorch on an NVIDIA GPU, every stage through torch.compile",
    HOST_LOOP: "PyTorch's stages on an NVIDIA GPU as CUDA graphs with the compiled kernels, the host decides",
    DEVICE_LOOP: "the same stages as one CUDA graph that decides on the GPU",
}
"""References by name."""


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


def precision_of(manifest: Manifest) -> Precision:
    """Return the precision for a bundle's network in PyTorch: half where the bundle has half."""
    return "fp16" if manifest.precision == "fp16" else "fp32"


def open_on_cuda(name: str, checkpoint: Checkpoint, manifest: Manifest) -> Network:
    """Open the network of a reference of `ON_CUDA`, from the checkpoint of one head.

    Raises BackendError if it cannot run here.
    """
    check_cuda_reference(name)
    open_it = open_with_kernels if name in (HOST_LOOP, DEVICE_LOOP) else open_plain
    return open_it(checkpoint, manifest.probing, precision_of(manifest), manifest.preprocessing)


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
    from asag_bench.runners.six_layers import PyramidStage
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
