"""Files that are damaged, hostile or not checkpoints at all, and our own format."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asag_deploy.errors import CheckpointError, OutputError
from asag_training.checkpoints import (
    FORMAT_VERSION,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
    select_head,
)
from asag_training.checkpoints.pack import main as pack
from support.checkpoint_files import (
    CATEGORIES,
    random_state,
    refusal,
    save_public,
    tiny_checkpoint,
    tiny_config,
)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["args", "model", "optimizer", "whole"])
def test_code_in_a_file_is_never_run(tmp_path: Path, legacy: bool, where: str) -> None:
    trace = tmp_path / "ran"
    content = (
        Hostile(trace) if where == "whole" else {"model": random_state(tiny_config()), where: Hostile(trace)}
    )
    path = tmp_path / "hostile.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert "holds pickled code (posix.mkdir), which is never run" in refusal(path, variant=tiny_config())
    assert not trace.exists()

    torch.load(path, weights_only=False)  # the file is as dangerous as it is meant to be
    assert trace.exists()


def test_code_in_a_plain_pickle_is_never_run(tmp_path: Path) -> None:
    trace, path = tmp_path / "ran", tmp_path / "hostile.pth"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(Hostile(trace), protocol))
        refusal(path)
        assert not trace.exists()


def test_class_of_another_project_is_named(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": tiny_config()}, tmp_path / "foreign.pth")
    assert "(asag_training.network.config.AsagConfig)" in refusal(tmp_path / "foreign.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"these are not the weights you are looking for", "neither a PyTorch nor a safetensors file"),
        (b"PK\x03\x04 and then nothing", "truncated or damaged"),
        (b"\x80\x02}", "truncated or damaged"),
        (pickle.dumps({"model": 1}, protocol=4), "saved in pickle protocol 4"),
        (b"\x10\0\0\0\0\0\0\0{}", "truncated or damaged"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{", "truncated or damaged"),
    ],
)
def test_file_that_is_no_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    assert message in refusal(path)


def test_path_that_is_no_file(tmp_path: Path) -> None:
    assert "there is no checkpoint file" in refusal(tmp_path / "missing.pth")
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    assert "cannot be read: Not a directory" in refusal(tmp_path / "file" / "inner.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_truncated_file(tmp_path: Path, kind: str, kept: float) -> None:
    whole, path = tmp_path / "whole", tmp_path / "truncated"
    if kind == "safetensors":
        save_checkpoint(whole, tiny_checkpoint())
    else:
        save_public(whole, random_state(tiny_config()), legacy=kind == "legacy")
    content = whole.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "truncated or damaged" in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no named weights"),
        ([1, 2], "holds no named weights"),
        ({"model": None}, "holds no named weights"),
        ({"epoch": 3}, "holds no named weights, only epoch"),
        (
            {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
            "holds no named weights, only optimizer",
        ),
        ({"model": {"a": torch.zeros(2, dtype=torch.int64)}}, "'a' is no floating point tensor"),
        (
            {"model": {"a": torch.zeros(2, dtype=torch.complex64)}},
            "'a' is no floating point tensor but complex64",
        ),
        ({"model": {"a": torch.empty(2, device="meta")}}, "holds the shapes of weights but no values"),
        ({"model": {"a": torch.zeros(2)}}, "none of its weights has a name that such a network has"),
    ],
    ids=str,
)
def test_file_without_a_network(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "file.pth")
    assert message in refusal(tmp_path / "file.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_diverged_weights(tmp_path: Path, value: float) -> None:
    state = random_state(tiny_config())
    state["rpn.roi.weight"][3, 5] = value
    path = save_public(tmp_path / "diverged.pth", state)
    assert "'rpn.roi.weight' of" in refusal(path, variant=tiny_config())


def same(a: Checkpoint, b: Checkpoint) -> bool:
    plain = all(
        getattr(a, name) == getattr(b, name) for name in ("config", "categories", "trained", "head", "epoch")
    )
    return plain and all(torch.equal(a.state[name], tensor) for name, tensor in b.state.items())


def test_own_file_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    for checkpoint in (
        tiny_checkpoint(epoch=7),
        tiny_checkpoint(trained=False),
        select_head(tiny_checkpoint(config=tiny_config(activation="silu", max_patches=60)), "aux_1"),
    ):
        save_checkpoint(path, checkpoint)
        assert same(load_checkpoint(path), checkpoint)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_files_whose_names_are_not_utf8(tmp_path: Path) -> None:
    own = tmp_path / os.fsdecode(b"own\xff.safetensors")
    checkpoint = tiny_checkpoint()
    save_checkpoint(own, checkpoint)
    assert same(load_checkpoint(own), checkpoint)
    public = save_public(tmp_path / os.fsdecode(b"public\xff.pth"), random_state(tiny_config()))
    assert load_checkpoint(public, variant=tiny_config()).config == tiny_config()


def test_half_the_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny_checkpoint()
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save_checkpoint(whole, checkpoint)
    assert pack([str(whole), str(half), "--set", "score_low=0.25"]) == 0
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    loaded = load_checkpoint(half)
    assert loaded.config == checkpoint.config.with_changes(score_low=0.25)
    assert loaded.categories == checkpoint.categories
    for name, tensor in loaded.state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, checkpoint.state[name].half().float())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: checkpoint, output"),
        (["none.pth", "out"], "there is no checkpoint file"),
        (["whole", "out", "--set", "score_low"], "cannot read the change"),
        (["whole", "out", "--set", "score_low=0.9"], "expected 0 <= score_low < score_high"),
        (["whole", "out", "--set", "hidden_dim=96"], "hidden_dim=96 need other weights"),
    ],
)
def test_what_cannot_be_packed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint("whole", tiny_checkpoint())
    assert pack(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_own_file_can_be_read_by_anyone(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    checkpoint = tiny_checkpoint()
    save_checkpoint(path, checkpoint)
    assert load_file(path).keys() == checkpoint.state.keys()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"])["variant"] == "tiny"
    assert json.loads(metadata["heads"]) == ["aux_0", "aux_1", "aux_2", "main"]
    assert metadata["producer"].startswith("asag-deploy ")


def test_own_file_knows_its_head(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, select_head(tiny_checkpoint(), "aux_2"))
    assert load_checkpoint(path, head="aux_2").head_names == ("aux_2",)
    with pytest.raises(CheckpointError, match="no head 'main' in the checkpoint; it has aux_2"):
        load_checkpoint(path, head="main")


def test_own_file_as_another_variant(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, tiny_checkpoint())
    changed = load_checkpoint(path, variant=tiny_config(score_low=0.2))
    assert changed.config.score_low == 0.2
    assert changed.categories == CATEGORIES
    assert "is not a checkpoint of asag-s-r50-100" in refusal(path, variant="asag-s-r50-100")


def test_safetensors_without_settings_is_a_bare_state_dict(tmp_path: Path) -> None:
    save_file(random_state(tiny_config()), tmp_path / "bare.safetensors")
    assert load_checkpoint(tmp_path / "bare.safetensors", variant=tiny_config()).config == tiny_config()


def test_altered_weights_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, tiny_checkpoint())
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    assert "is damaged (the weights are not those that were saved)" in refusal(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "asag_format_version",
            str(FORMAT_VERSION + 1),
            "was written by a newer release (format 2, this one reads 1)",
        ),
        ("asag_format_version", "one", "is damaged"),
        ("config", "{", "is damaged"),
        ("config", "[]", "is damaged"),
        (
            "config",
            '{"variant": "tiny", "heads": "4"}',
            'is damaged (`config.heads` is "4", expected a whole',
        ),
        (
            "config",
            '{"variant": "tiny", "heads": true}',
            "is damaged (`config.heads` is true, expected a whole",
        ),
        ("config", '{"variant": "tiny", "depth": 50}', "is damaged (`config.depth` is not a known field)"),
        (
            "config",
            '{"variant": "tiny", "backbone_depth": 34}',
            "is damaged (network setting backbone_depth 34",
        ),
        ("config", '{"variant": "tiny"}', "is damaged (the weights are not those of tiny"),
        ("categories", '[{"id": 1, "name": "circle"}]', "is damaged (1 class name was"),
        ("categories", "[1, 2, 3]", "is damaged"),
        ("trained", "1", "is damaged (`trained` is 1, expected true or false)"),
        ("preprocessing", "{}", "is damaged (`preprocessing.shorter_side` is missing)"),
        ("head", '"main"', "is damaged (head 'main' cannot be selected"),
    ],
)
def test_metadata_is_checked(tmp_path: Path, key: str, value: str, message: str) -> None:
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, tiny_checkpoint())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, key: value})
    assert message in refusal(path)


@pytest.mark.parametrize("length", [0xF080, int.from_bytes(b"PK\1", "little")])
def test_a_header_whose_length_begins_as_another_kind_of_file(tmp_path: Path, length: int) -> None:
    """The byte that pickles begin with, and the two that archives do."""
    path, config = tmp_path / "own.safetensors", tiny_config(heads=1)
    save_checkpoint(path, tiny_checkpoint(config=config, state=random_state(config)))
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end] + b" " * (length - len(content[8:end]))
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    assert len(header) == length
    assert load_checkpoint(path).categories == CATEGORIES


def test_settings_that_a_file_lacks_have_their_default(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, tiny_checkpoint())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    del config["min_anchor_side"]
    save_file(load_file(path), path, {**metadata, "config": json.dumps(config)})
    assert load_checkpoint(path).config == tiny_config()


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.safetensors"
    checkpoint = tiny_checkpoint()
    save_checkpoint(path, checkpoint)

    def fail_halfway(file: Path, content: bytes) -> int:
        with file.open("wb") as half:
            half.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fail_halfway)
        with pytest.raises(OutputError, match=r"own\.safetensors"):
            save_checkpoint(path, checkpoint)
    assert same(load_checkpoint(path), checkpoint)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="could not write"):
        save_checkpoint(tmp_path / "file" / "own.safetensors", tiny_checkpoint())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_long_text_in_the_place_of_a_class_is_refused_at_once(legacy: bool, tmp_path: Path) -> None:
    """PyTorch goes through its own message about it in the square of its length: 10,000 take seconds."""
    text = "x" * 200_000
    pickled = b"\x80\x02X" + struct.pack("<I", len(text)) + text.encode() + b")R."
    path = tmp_path / "damaged.pth"
    if legacy:
        path.write_bytes(pickled)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("damaged/data.pkl", pickled)
            archive.writestr("damaged/version", "3\n")
    with pytest.raises(CheckpointError, match="200000 characters without a space"):
        load_checkpoint(path)


def test_arrays_of_numpy_beside_the_weights_are_no_long_texts(tmp_path: Path) -> None:
    config = tiny_config()
    path = tmp_path / "a.pth"
    torch.save({"model": random_state(config), "metric": np.arange(20_000), "again": np.ones(9_000)}, path)
    assert load_checkpoint(path, variant=config).config == config
