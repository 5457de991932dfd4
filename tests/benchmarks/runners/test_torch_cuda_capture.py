"""Nothing in the stages copies from the host or waits for it, which the capture of a CUDA graph forbids.

Seen on PyTorch's `meta` device, where a tensor on the CPU can only be the host's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asag_export.stage_export import prepare_for_export, stage_inputs
from asag_training.network.model import build
from asag_training.network.operator_choice import use_operators
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import StageModule
from support.small_network import small_checkpoint

FROM_THE_HOST = {"tensor", "as_tensor", "from_numpy", "asarray"}
SIZES = {"batch": 2, "height": 192, "width": 256, "patches": 3, "queries": 7, "detections": 9}


class Spy(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch's
    """Notes every operation that touches a tensor of the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        tensors: Iterable[Any] = tree_leaves((args, kwargs, out))
        if any(isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(str(func))
        return out


class SpyOnCalls(TorchFunctionMode):
    """Notes every tensor made of the host's numbers, which `Spy` cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in FROM_THE_HOST:
            self.found.append(f"torch.{func.__name__}{args}")
        return func(*args, **(kwargs or {}))


class Nowhere:
    """The operators as kernels on the `meta` device: memory for what they give."""

    def multiscale_roi_align(self, features: Any, boxes: Any, strides: Any) -> torch.Tensor:
        return features[0].new_empty((*boxes.shape[:2], 7, 7, features[0].shape[-1]))  # type: ignore[no-any-return]

    def pyramid_sample(self, features: Any, xy: Any, weight: Any, strides: Any) -> torch.Tensor:
        return features[0].new_empty((*xy.shape[:4], features[0].shape[-1] // xy.shape[2]))  # type: ignore[no-any-return]

    def deformable_sample(self, features: Any, xy: Any, weight: Any) -> torch.Tensor:
        return features[0].new_empty((*xy.shape[:2], features[0].shape[-1]))  # type: ignore[no-any-return]

    def pad_anchors(self, anchors: Any, keep: Any, image_size: Any, slots: Any, *_: int) -> Any:
        batch = anchors.shape[0]
        return anchors.new_empty((batch, len(slots), 4)), image_size.new_empty((batch,))


def what_comes_from_the_host(stage: StageModule, inputs: list[torch.Tensor]) -> list[str]:
    spy, calls = Spy(), SpyOnCalls()
    with torch.no_grad(), use_operators(Nowhere()), calls, spy:
        stage(*inputs)
    assert spy.operations > 5
    return [*spy.found, *calls.found]


@pytest.mark.parametrize(
    "variant", ["asag-a-r50-100", "asag-s-r50-100", "asag-d-r50-100", "asag-a-r50-crowdhuman"]
)
def test_stages_stay_on_the_device(variant: str) -> None:
    checkpoint = small_checkpoint(variant)
    probing = probing_plan(checkpoint.config)
    model = prepare_for_export(build(checkpoint.config, checkpoint.state), "fp16")
    stages = build_stages(model, probing)
    assert len(stages) == 5
    for stage in stages:
        specs = stage_inputs(stage, checkpoint.config, probing, "fp16")
        shapes = [[n if isinstance(n, int) else size(n) for n in spec.shape] for spec in specs]
        types = [getattr(torch, spec.dtype) for spec in specs]
        inputs = [
            torch.empty(shape, dtype=kind, device="meta") for shape, kind in zip(shapes, types, strict=True)
        ]
        assert what_comes_from_the_host(stage.to("meta"), inputs) == []


def size(name: str) -> int:
    if name in SIZES:
        return SIZES[name]
    if name.startswith("anchors"):
        return 60
    side, level = name.split("_")
    return SIZES[side] >> (3 if level == "feature" else int(level[1:]))


class Constant(StageModule):
    """A stage that does what it must not."""

    name = "constant"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x * 2 + 1) * 3 - 2) / 5 + torch.tensor([1.0, 2.0], device=x.device)


class Waits(Constant):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x * 2 + 1) * 3 - 2) / 5 * torch.ones(2).to(x.device)


@pytest.mark.parametrize(("stage", "what"), [(Constant(), "torch.tensor"), (Waits(), "aten._to_copy")])
def test_a_copy_from_the_host_is_seen(stage: StageModule, what: str) -> None:
    found = what_comes_from_the_host(stage, [torch.empty(2, device="meta")])
    assert any(what in name for name in found), found
