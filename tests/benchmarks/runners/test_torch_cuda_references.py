"""The references that run PyTorch on a GPU: refused where there is none, and timed on a simulated one."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asag_bench.cli import main
from asag_bench.measuring import torch_cuda_loop
from asag_bench.measuring.torch_cuda_loop import exit_rules, measure, picture
from asag_bench.runners import references
from asag_bench.runners.references import ON_CUDA, REFERENCES, check_references, open_reference
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import GraphSpec, Manifest, Preprocessing
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.engines.shapes import MOST_SLOTS
from asag_deploy.errors import BackendError
from asag_deploy.loop.probing import detect
from asag_deploy.loop.stopping import StopRule
from asag_evaluation.data.doodles import draw_doodles
from asag_export.stage_export import stage_inputs, stage_outputs
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages, postprocessing_plan, probing_plan
from asag_training.network.stages import TorchNetwork
from support.simulated_gpu.fake_torch import fake_torch_network
from support.small_network import small_checkpoint

CHECKPOINT = small_checkpoint(backbone_depth=26)
PROBING = probing_plan(CHECKPOINT.config)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """What the manifest would say; the graphs themselves are not needed."""
    modules = build_stages(build(CHECKPOINT.config, CHECKPOINT.state), PROBING)
    given = (CHECKPOINT.config, PROBING, "fp32")
    manifest = Manifest(
        producer="tests",
        variant=CHECKPOINT.config.variant,
        head="main",
        precision="fp32",
        opset=20,
        trained=False,
        categories=tuple(CHECKPOINT.categories),
        preprocessing=Preprocessing(shorter_side=96, longer_side=160),
        probing=PROBING,
        postprocessing=postprocessing_plan(CHECKPOINT.config),
        graphs=tuple(
            GraphSpec(
                name=module.name,
                file=f"{module.name}.onnx",
                sha256="",
                inputs=stage_inputs(module, *given),  # type: ignore[arg-type]
                outputs=stage_outputs(module, *given),  # type: ignore[arg-type]
            )
            for module in modules
        ),
    )
    return Bundle(path=Path(), manifest=manifest)


def opened(name: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Any:
    from asag_training import checkpoints

    monkeypatch.setattr(checkpoints, "untrained_checkpoint", lambda variant: CHECKPOINT)
    network: Any = None  # of the bundle, which these references do without
    return open_reference(name, bundle, network, DetectorOptions(), None)


@pytest.mark.parametrize("name", ON_CUDA)
def test_refused_where_pytorch_has_no_cuda(
    name: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name in REFERENCES
    monkeypatch.setattr(torch.version, "cuda", None)
    sentence = (
        f"the reference '{name}' runs on an NVIDIA GPU alone: PyTorch .* was built without CUDA; install"
    )
    with pytest.raises(BackendError, match=sentence):
        check_references([name], None, bundle.manifest)
    with pytest.raises(BackendError, match=sentence):
        opened(name, bundle, monkeypatch)


def test_refused_without_a_gpu_or_kernels(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="PyTorch finds no NVIDIA GPU on this machine; check with"):
        check_references(["torch-eager-cuda"], None, bundle.manifest)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ASAG_KERNELS_LIBRARY", raising=False)
    check_references(["torch-eager-cuda", "torch-compile-cuda"], None, bundle.manifest)
    with pytest.raises(BackendError, match=r"takes the compiled kernels; build them .* ASAG_KERNELS_LIBRARY"):
        check_references(["torch-cuda"], None, bundle.manifest)


@pytest.mark.parametrize("name", ["torch-cuda", "torch-cuda-device"])
def test_both_loops_are_timed(
    name: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, host_library_path: Path
) -> None:
    network, _, kernels = fake_torch_network(monkeypatch, host_library_path, CHECKPOINT, PROBING)
    monkeypatch.setattr(references, "why_not_on_cuda", lambda name: None)
    monkeypatch.setattr(references, "open_with_kernels", lambda *_: network)
    runner = opened(name, bundle, monkeypatch)
    image = draw_doodles(96, 128, 0)
    run, plain = runner([image], None), opened("torch", bundle, monkeypatch)([image], None)
    assert run.exits == plain.exits
    assert ("decoder" in run.phases_ms) == (name == "torch-cuda")
    assert {"preprocess", "patch_nms", "postprocess"} <= set(kernels.calls)
    assert runner([image], "P5").exits == ("P5",)
    network.close()


@pytest.mark.parametrize("name", ["torch-eager-cuda", "torch-compile-cuda"])
def test_pytorch_as_it_is(name: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(references, "why_not_on_cuda", lambda name: None)
    plain = TorchNetwork(build_stages(build(CHECKPOINT.config, CHECKPOINT.state), PROBING))
    monkeypatch.setattr(references, "open_plain", lambda *_: plain)

    def no_compiler(stage: Any, *, dynamic: bool) -> Any:
        compiled.append(stage.name)
        return stage

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert opened(name, bundle, monkeypatch)([draw_doodles(96, 128, 0)], "P5").exits == ("P5",)
    assert len(compiled) == (5 if name == "torch-compile-cuda" else 0)


@pytest.mark.slow
def test_what_deciding_costs(monkeypatch: pytest.MonkeyPatch, host_library_path: Path) -> None:
    network, cuda, kernels = fake_torch_network(monkeypatch, host_library_path, CHECKPOINT, PROBING)
    plain = TorchNetwork(build_stages(build(CHECKPOINT.config, CHECKPOINT.state), PROBING))
    image, size = picture((128, 160))
    rules = exit_rules(plain, PROBING, plain.upload(image), size)
    exits = {
        name: detect(plain, PROBING, rule, plain.upload(image), size).levels[-1].level
        for name, rule in rules.items()
    }
    assert {name: level for name, level in exits.items() if name != "fast"} == {
        "P5": "P5",
        "P4": "P4",
        "P3": "P3",
    }
    found: dict[str, Any] = {}
    monkeypatch.setattr("asag_bench.measuring.torch_cuda_loop.WARM_UPS", 0)
    measure(plain, network, PROBING, image, size, repeats=1, note=found.__setitem__)
    assert list(found) == ["parts", "P5", "P4", "P3", "fast"]
    parts = ["pyramid", "backbone", "select_p4", "probe_p4", "select_p3", "probe_p3", "decoder"]
    assert list(found["parts"]) == parts
    for name, row in found.items():
        if name != "parts":
            assert row["levels"][-1] == exits[name]
            assert row["deciding_us"]["device"] == 0, "every pair of events of the simulation is as far apart"
            assert row["largest_difference"] < 1e-3
            assert row["detected_again"] == 0
    json.dumps(found, allow_nan=False)
    assert kernels.calls.count("decide") > 0
    gc.collect()  # what was noted refers to itself
    network.close()
    assert cuda.leaked() == {}


def test_an_image_is_timed_with_no_more_patches_than_the_graph_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else what is called the device's loop would be both, one after the other."""
    monkeypatch.setattr(torch_cuda_loop, "_ALL", StopRule(max_patches=16))  # as if there were no more room
    network = TorchNetwork(build_stages(build(CHECKPOINT.config, CHECKPOINT.state), PROBING))
    image, size = picture((480, 640))
    given = network.upload(image)

    def most(rule: StopRule) -> int:
        levels = detect(network, PROBING, rule, given, size).levels
        return max(int(level.patches.max()) for level in levels)

    assert most(StopRule()) > 16
    assert all(most(rule) <= 16 for rule in exit_rules(network, PROBING, given, size).values())
    monkeypatch.undo()
    rules = exit_rules(network, PROBING, given, size).values()
    assert all(rule.max_patches is not None and rule.max_patches <= MOST_SLOTS for rule in rules)


def test_the_command_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main(["torch-cuda-loop", "--shape", "100x100"]) == 2
    assert "--shape is '100x100'; expected multiples of 32" in capsys.readouterr().err
    assert main(["torch-cuda-loop"]) == 2
    assert "runs on an NVIDIA GPU alone: PyTorch" in capsys.readouterr().err


def test_loops_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from asag_bench.measuring.torch_cuda_loop import difference
    from asag_deploy.errors import ParityError

    network = TorchNetwork(build_stages(build(CHECKPOINT.config, CHECKPOINT.state), PROBING))
    image, size = picture((128, 160))
    given = network.upload(image)
    whole, short = (
        detect(network, PROBING, rule, given, size) for rule in (StopRule(), StopRule(max_level="P5"))
    )
    assert difference(network, "here", whole, whole) == 0
    with pytest.raises(ParityError, match="P3: the loop on the device decided otherwise than the host's"):
        difference(network, "P3", whole, short)
    assert np.isfinite(image).all()
