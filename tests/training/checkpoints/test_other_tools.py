"""Checkpoints as other tools leave them: what can be read is read, and of the rest it is said what it is."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gzip
import io
import json
import pathlib
import pickle
import sys
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import CheckpointError
from asag_training.checkpoints import load_backbone, load_checkpoint, save_checkpoint
from asag_training.checkpoints.pack import main as pack
from asag_training.network.model import Asag
from support.checkpoint_files import random_state, refusal, tiny_config

State = dict[str, Tensor]

CONFIG = tiny_config(heads=1)


@pytest.fixture(scope="module")
def state() -> State:
    return random_state(CONFIG)


@pytest.fixture(scope="module")
def average(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


def named(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_holds(path: Path, state: State, **options: Any) -> tuple[str, ...]:
    """The file has these weights; return what is said of it."""
    found = load_checkpoint(path, variant=CONFIG, **options)
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in state.items())
    assert all("\n" not in note for note in found.notes)
    return found.notes


PREFIXES = (
    *("_orig_mod.", "module.", "model.", "net.", "network.", "detector.", "_forward_module."),
    *("module._orig_mod.", "_orig_mod.module.", "model._orig_mod.module.", "_forward_module.model."),
)
"""What wrappers put before every name."""


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_of_wrappers(tmp_path: Path, state: State, prefix: str) -> None:
    torch.save(named(state, prefix), tmp_path / "wrapped.pth")
    assert_holds(tmp_path / "wrapped.pth", state)


def test_wrappers_within(tmp_path: Path, state: State) -> None:
    """Of a part that was compiled, sharded or trained by several processes by itself."""
    renamed = {
        name.replace("backbone.0.", "backbone.0._orig_mod.")
        .replace("neck.", "neck.module.")
        .replace("rpn.", "rpn._fsdp_wrapped_module._checkpoint_wrapped_module."): tensor
        for name, tensor in state.items()
    }
    torch.save(renamed, tmp_path / "within.pth")
    assert_holds(tmp_path / "within.pth", state)


CONTAINERS: dict[str, Callable[[State], Any]] = {
    "state_dict": lambda s: {"state_dict": s},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}, "loss": 0.1},
    "net": lambda s: {"net": s, "acc": 91.0, "epoch": 3},
    "ordered": lambda s: {"model": OrderedDict(s)},
    "lightning": lambda s: {
        "epoch": 3,
        "global_step": 99,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": named(s, "model."),
        "loops": {"fit_loop": {"state_dict": {}}},
        "hyper_parameters": {"lr": 1e-4, "out": pathlib.Path("/runs/a")},
    },
    "mmdet": lambda s: {"meta": {"epoch": 3, "classes": ("a", "b", "c")}, "state_dict": s, "optimizer": {}},
    "deepspeed": lambda s: {"module": s, "dp_world_size": 2, "ds_version": "0.17"},
    "states in a tuple": lambda s: (s, {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}),
    "nested": lambda s: {"checkpoint": {"weights": {"model": s}}},
    "numpy": lambda s: {"model": {name: tensor.numpy() for name, tensor in s.items()}},
    "counted by thop": lambda s: {
        **s,
        **{f"{name.rpartition('.')[0]}.total_ops": torch.zeros(1, dtype=torch.float64) for name in s},
        "total_params": torch.zeros(1, dtype=torch.float64),
    },
    "parameters": lambda s: {name: torch.nn.Parameter(tensor) for name, tensor in s.items()},
    "beside": lambda s: {**s, "ema_updates": torch.tensor(7), "criterion.weight": torch.ones(4), "step": 3},
    "metrics": lambda s: {
        "model": s,
        "epoch": np.int64(3),
        "best": {
            "map": np.float32(0.4),
            "ok": np.bool_(True),
            "curve": np.arange(3.0),
            "half": np.float16(1),
        },
        "args": argparse.Namespace(output_dir=pathlib.Path("x"), seed=np.int32(1), tags=["a"]),
        "history": defaultdict(list, loss=[1.0]),
        "where": pathlib.PureWindowsPath("c:/x"),
    },
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers(tmp_path: Path, state: State, kind: str) -> None:
    for legacy in (False, True):
        torch.save(CONTAINERS[kind](state), tmp_path / "file.ckpt", _use_new_zipfile_serialization=not legacy)
        assert_holds(tmp_path / "file.ckpt", state)
    found = load_checkpoint(tmp_path / "file.ckpt", variant=CONFIG)
    assert found.epoch == (3 if kind in ("net", "lightning", "mmdet", "metrics") else None)
    classes = [category.name for category in found.categories]
    assert classes == (["a", "b", "c"] if kind == "mmdet" else ["class_0", "class_1", "class_2"])


@pytest.mark.parametrize(
    "said",
    [
        {"names": {2: "c", 0: "a", 1: "b"}},
        {"id2label": {"10": "c", "9": "b", "1": "a"}},
        {"hyper_parameters": {"class_names": ["a", "b", "c"]}},
        {"args": argparse.Namespace(names={0: "a", 1: "b", 2: "c"})},
    ],
)
def test_names_of_classes_are_in_the_order_of_their_numbers(
    tmp_path: Path, state: State, said: dict[str, Any]
) -> None:
    torch.save({"model": state, **said}, tmp_path / "file.pth")
    found = load_checkpoint(tmp_path / "file.pth", variant=CONFIG)
    assert [category.name for category in found.categories] == ["a", "b", "c"]


def test_classes_of_one_name_are_told_apart_by_their_ids(tmp_path: Path, state: State) -> None:
    torch.save({"model": state, "classes": ["a", "b", "a"]}, tmp_path / "file.pth")
    found = load_checkpoint(tmp_path / "file.pth", variant=CONFIG)
    assert [(category.id, category.name) for category in found.categories] == [(0, "a"), (1, "b"), (2, "a")]


AVERAGED: dict[str, Callable[[State, State], Any]] = {
    "model_ema": lambda s, e: {"model": s, "model_ema": e},
    "emaModel": lambda s, e: {"emaModel": e, "model": s},
    "avg-model": lambda s, e: {"avg-model": e, "model": s},
    "mmcv, which swaps them": lambda s, e: {
        "meta": {"mmcv_version": "1.6.0"},
        "state_dict": {
            **{name: s[name] if "running_" in name else tensor for name, tensor in e.items()},
            **{f"ema_{name.replace('.', '_')}": s[name] for name in s if "running_" not in name},
        },
    },
    "ema module": lambda s, e: {"ema": {"module": e, "updates": 9}, "model": s},
    "timm": lambda s, e: {"state_dict_ema": e, "state_dict": s},
    "ema_state_dict": lambda s, e: {
        "state_dict": s,
        "ema_state_dict": {"steps": torch.tensor(3), **named(e, "module.")},
    },
    "mmengine, which swaps them": lambda s, e: {
        "meta": {"mmengine_version": "0.10.4", "epoch": 3},
        "state_dict": e,
        "ema_state_dict": {"steps": torch.tensor(3), **named(s, "module.")},
    },
    "Lightning, which saves the average": lambda s, e: {
        "state_dict": named(e, "model."),
        "current_model_state": named(s, "model."),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "torch": lambda s, e: {
        "model": s,
        "averaged_model": {"n_averaged": torch.tensor(3), **named(e, "module.")},
    },
    "one dict": lambda s, e: {"state_dict": {**named(e, "ema_model.module."), **named(s, "model.")}},
    "teacher": lambda s, e: {"teacher": e, "student": s},
    "parameters only": lambda s, e: {
        "model": s,
        "ema": {name: tensor for name, tensor in e.items() if "running_" not in name},
    },
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_averaged_weights(tmp_path: Path, state: State, average: State, kind: str) -> None:
    """The trained ones unless the others are asked for; in a line that says that there are others."""
    path = tmp_path / "both.pth"
    torch.save(AVERAGED[kind](state, average), path)
    assert any("`--weights ema` takes them" in note for note in assert_holds(path, state))
    if kind in ("parameters only", "mmcv, which swaps them"):
        average = average | {name: tensor for name, tensor in state.items() if "running_" in name}
    notes = assert_holds(path, average, weights="ema")
    assert any("averaged weights (EMA) were taken" in note for note in notes)


def test_averaged_weights_alone_or_not_at_all(tmp_path: Path, state: State, average: State) -> None:
    torch.save({"ema_state_dict": average}, tmp_path / "ema.pth")
    for choice in ("model", "ema"):
        notes = assert_holds(tmp_path / "ema.pth", average, weights=choice)
        assert any("averaged weights (EMA) were taken" in note for note in notes)
    torch.save({**named(average, "module."), "n_averaged": torch.tensor(3)}, tmp_path / "swa.pth")
    assert any("averaged weights (EMA) were" in note for note in assert_holds(tmp_path / "swa.pth", average))
    torch.save({"model": state}, tmp_path / "model.pth")
    assert "holds no averaged weights (EMA)" in refusal(tmp_path / "model.pth", weights="ema")


def test_programs_say_which_weights(
    tmp_path: Path, state: State, average: State, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": named(state, "net."), "ema": average}, tmp_path / "both.pth")
    assert pack([str(tmp_path / "both.pth"), str(tmp_path / "a.safetensors"), "--weights", "ema"]) == 0
    error = capsys.readouterr().err
    assert "averaged weights (EMA) were taken, from 'ema'" in error
    assert "there are weights too, in names that begin with 'net.' under 'state_dict'" in error
    loaded = load_checkpoint(tmp_path / "a.safetensors").state
    assert torch.equal(loaded["neck.inner_blocks.0.0.bias"], average["neck.inner_blocks.0.0.bias"])


@pytest.mark.parametrize(
    "kind",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        "quantised",
        "sparse",
    ],
    ids=str,
)
def test_types_of_numbers(tmp_path: Path, state: State, kind: Any) -> None:
    def stored(tensor: Tensor) -> Tensor:
        if kind == "sparse":
            return tensor.to_sparse()
        if kind != "quantised":
            return tensor.to(kind)
        with warnings.catch_warnings(action="ignore"):  # it is to go, but there are files of it
            return torch.quantize_per_tensor(tensor, 0.5, 3, torch.qint8)

    def back(tensor: Tensor) -> Tensor:
        return (
            tensor.to_dense()
            if kind == "sparse"
            else (tensor.dequantize() if kind == "quantised" else tensor.float())
        )

    changed = {name: stored(tensor) for name, tensor in state.items()}
    torch.save({"model": changed}, tmp_path / "file.pth")
    notes = assert_holds(tmp_path / "file.pth", {name: back(tensor) for name, tensor in changed.items()})
    few = kind == "quantised" or (isinstance(kind, torch.dtype) and kind.itemsize == 1)
    assert few == any("were made float32" in note for note in notes)


def test_safetensors_of_others(tmp_path: Path, state: State) -> None:
    """With metadata of their own, and in parts that an index lists."""
    names = sorted(state)
    save_file(named(state, "module."), tmp_path / "whole.safetensors", {"format": "pt", "epoch": "3"})
    assert_holds(tmp_path / "whole.safetensors", state)
    parts = {"a.safetensors": names[:40], "b.safetensors": names[40:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {n: f for f, part in parts.items() for n in part}})
    )
    assert_holds(index, state)
    torch.save({name: state[name] for name in parts["b.safetensors"]}, tmp_path / "b.bin")
    index.write_text(index.read_text().replace("b.safetensors", "b.bin"))
    assert_holds(index, state)
    index.write_text(index.read_text().replace("b.bin", "b.safetensors"))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there is no checkpoint file '.*b\.safetensors'"):
        load_checkpoint(index)


def test_settings_of_libraries_that_are_not_here(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects of omegaconf and the like are passed over, and nothing of theirs is imported or run."""
    for name, base in (("omegaconf.dictconfig.DictConfig", object), ("yacs.config.CfgNode", dict)):
        module_name, _, kind = name.rpartition(".")
        module = types.ModuleType(module_name)
        cls = type(kind, (base,), {"__module__": module_name, "__setstate__": lambda self, s: None})
        setattr(module, kind, cls)
        with monkeypatch.context() as patched:
            for parent in (module_name.partition(".")[0], module_name):
                patched.setitem(sys.modules, parent, module)
            config = cls()
            config.lr = 1
            torch.save({"state_dict": state, "hyper_parameters": config}, tmp_path / "file.ckpt")
        assert module_name not in sys.modules
        assert_holds(tmp_path / "file.ckpt", state)
        assert module_name not in sys.modules


def tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("model.pth")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"{}")
    return file.getvalue()


OTHERS = {
    "web page": (b"\n<!DOCTYPE html><html><head>Sign in", "a web page, as a download leaves"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
    "gzip": (gzip.compress(b"x" * 1000), "compressed by gzip: unpack it first"),
    "tar": (tar(b"x" * 100), "a tar archive: unpack it first"),
    "onnx": (b"\x08\x08\x12\x07pytorch:\x00", "an ONNX graph"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "numpy": (b"\x93NUMPY\x01\x00", "a single NumPy array"),
    "torchscript": (zipped("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"), "a TorchScript program"),
    "pt2": (zipped("m/archive_format", "m/models/model.json"), "a program of torch.export (.pt2)"),
    "npz": (zipped("a.npy"), "an archive of NumPy arrays"),
    "zip of a file": (zipped("folder/model.pth"), "a zip archive: unpack it first"),
    "word document": (zipped("[Content_Types].xml"), "a zip archive that torch.save did not write"),
    "json": (b'{"a": 1}', "JSON, and no index of weight files"),
    "plain pickle": (pickle.dumps({"a": [1]}, protocol=2), "a pickle that torch.save did not write"),
    "newer pickle": (pickle.dumps({"a": [1]}, protocol=4), "saved in pickle protocol 4"),
    "damaged pickle": (pickle.dumps({"a": [1]}, protocol=2)[:-4], "truncated or damaged"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_else_a_file_can_be(tmp_path: Path, kind: str) -> None:
    content, message = OTHERS[kind]
    (tmp_path / "file.pth").write_bytes(content)
    assert message in refusal(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["manifest.json", "backbone.onnx"], "a bundle, which holds graphs and no weights"),
        ([".metadata", "__0_0.distcp"], "a distributed checkpoint in shards"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], "a checkpoint of DeepSpeed in shards"),
        (["config.json", "model.safetensors.index.json"], "model.safetensors.index.json'"),
        (["readme"], "a directory; give the checkpoint file in it"),
    ],
)
def test_what_a_folder_can_be(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert message in refusal(tmp_path)


def test_newer_pickles_are_named(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "file.pth", pickle_protocol=4)
    assert "saved in pickle protocol 4" in refusal(tmp_path / "file.pth")


def test_averages_without_names_are_pointed_out(tmp_path: Path, state: State) -> None:
    shadow = [tensor + 1 for tensor in state.values()]
    torch.save({"model": state, "ema": {"decay": 0.9, "shadow_params": shadow}}, tmp_path / "file.pth")
    (note,) = assert_holds(tmp_path / "file.pth", state)
    assert "in 'ema.shadow_params', which are a list without names" in note
    assert "'ema.shadow_params'" in refusal(tmp_path / "file.pth", variant=CONFIG, weights="ema")


def test_the_state_of_a_run_is_named(tmp_path: Path, state: State) -> None:
    """It does not say to others how images are prepared; what lies beside it does."""
    content = {"run": {}, "position": {}, "made": {}, "model": state}
    torch.save(content, tmp_path / "state.pt")
    assert "give last.safetensors or best.safetensors beside it" in refusal(tmp_path / "state.pt")


def test_stored_anew_a_checkpoint_says_no_more_than_before(tmp_path: Path, state: State) -> None:
    """Classes that nobody named have no names either; and equal checkpoints are equal files."""
    torch.save(state, tmp_path / "file.pth")
    unnamed = load_checkpoint(tmp_path / "file.pth")
    assert not unnamed.named
    files = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for file in files:
        save_checkpoint(file, unnamed)
    again = load_checkpoint(files[0])
    assert (again.named, again.assumed, again.categories) == (False, unnamed.assumed, unnamed.categories)
    assert len({file.read_bytes() for file in files}) == 1
    names = tuple(Category(id=i, name=name) for i, name in enumerate("abcdefg"[: len(again.categories)]))
    save_checkpoint(files[0], dataclasses.replace(again, categories=names, named=True))
    assert load_checkpoint(files[0]).named


class Settings:
    """What a run's own code leaves in its checkpoints."""

    def __init__(self) -> None:
        self.lr = 1


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_of_unknown_classes_are_passed_over(
    tmp_path: Path, state: State, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.ckpt"
    when = datetime.datetime(2024, 5, 6, tzinfo=datetime.UTC)
    schedule = torch.optim.lr_scheduler.StepLR
    beside = {"settings": Settings(), "kind": schedule, "args": types.SimpleNamespace(lr=1, when=when)}
    torch.save({"model": state, **beside}, path, _use_new_zipfile_serialization=not legacy)
    for each in (Settings, schedule):
        monkeypatch.setattr(each, "__init__", lambda *given: pytest.fail("code was run"))
    notes = assert_holds(path, state)
    assert any(f"objects of {__name__}.Settings and 1 other kinds were passed over" in note for note in notes)
    torch.save({"model": state, "settings": Hostile()}, path, _use_new_zipfile_serialization=not legacy)
    assert "(eval), which is never run" in refusal(path)


def test_whole_modules_are_named(tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "module.pth")
    assert "(torch.nn.modules.container.Sequential), which is never run" in refusal(tmp_path / "module.pth")


@pytest.mark.parametrize(
    ("names", "detector"),
    [
        (("transformer.encoder.layers.0.norm1.weight", "query_embed.weight", "class_embed.bias"), "DETR"),
        (("init_proposal_boxes.weight", "backbone.bottom_up.stem.conv1.weight"), "Sparse R-CNN"),
        (
            ("rpn_head.init_content_features.weight", "roi_head.bbox_head.0.sampling_n_mixing.x", "neck.a.b"),
            "AdaMixer",
        ),
        (("model.0.conv.weight", "model.0.bn.weight"), "a YOLO"),
    ],
)
def test_other_detectors_are_recognised(tmp_path: Path, names: tuple[str, ...], detector: str) -> None:
    torch.save({"model": {name: torch.zeros(2) for name in names}}, tmp_path / "other.pth")
    assert refusal(tmp_path / "other.pth").endswith(f"it is {detector}")


def test_a_name_that_is_nearly_right(tmp_path: Path, state: State) -> None:
    renamed = {name.replace("rpn.fc_cls.", "rpn.fc_clss."): tensor for name, tensor in state.items()}
    torch.save(renamed, tmp_path / "renamed.pth")
    message = refusal(tmp_path / "renamed.pth", variant=CONFIG)
    assert "missing: rpn.fc_cls.weight, rpn.fc_cls.bias; unexpected: rpn.fc_clss.weight" in message
    assert "'rpn.fc_clss.weight' is nearly 'rpn.fc_cls.weight'" in message


def test_backbones_in_containers(tmp_path: Path, state: State) -> None:
    """A self-supervised one under its encoder's name, and that of a whole detector."""
    prefix = "backbone.0.body."
    body = {name.removeprefix(prefix): t + 1 for name, t in state.items() if name.startswith(prefix)}
    for content in (
        {"state_dict": named({**body, "fc.weight": torch.zeros(3, 3)}, "module.encoder_q.")},
        {
            "model": {
                **named(body, prefix),
                "neck.x": torch.zeros(1),
                "transformer.norm1.bias": torch.zeros(1),
            }
        },
    ):
        model = Asag(CONFIG)
        torch.save(content, tmp_path / "backbone.pth")
        load_backbone(model, tmp_path / "backbone.pth")
        assert all(torch.equal(model.state_dict()[prefix + name], tensor) for name, tensor in body.items())
