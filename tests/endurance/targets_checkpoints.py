"""Containers of weights: PyTorch's files, old and new, and safetensors; and the states of training runs."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from asag_deploy.errors import CheckpointError
from asag_training.checkpoints import load_backbone, load_checkpoint, save_checkpoint
from asag_training.network.model import Asag
from endurance.damage import damaged_bytes, damaged_json, damaged_pickles
from endurance.judging import Target
from support.checkpoint_files import random_state, save_public, tiny_checkpoint, tiny_config
from support.training_runs import make_trainer, write_pictures

_CANARY = "ran-code"
"""A file that appears in the working folder if a pickle has run what it brought along."""


@contextmanager
def open_checkpoints(folder: Path) -> Iterator[Target]:
    """The bytes of a weight file, which is loaded as a network and as a backbone."""
    path = folder / "weights"
    config = tiny_config()
    narrow = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in random_state(config).items()}
    shared = torch.zeros(1)  # which all tensors of the other seeds share, so that their files are small
    state = {name: shared.expand(tensor.shape) for name, tensor in narrow.items()}
    small = {"model": {"a": torch.ones(2), "b": torch.zeros(1, dtype=torch.float16)}, "epoch": 3}
    zips = [_bytes_of(lambda to: save_public(to, state), path), _saved(small), _saved(state)]
    old = [_bytes_of(lambda to: save_public(to, state, legacy=True), path), _saved(small, legacy=True)]
    native = _bytes_of(lambda to: save_checkpoint(to, tiny_checkpoint(state=state)), path)
    part = folder / "part.safetensors"  # which an index may list
    part.write_bytes(native)
    model = Asag(config)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        load_checkpoint(path)
        load_checkpoint(path, variant=config)
        load_backbone(model, path)

    inputs = st.one_of(
        damaged_bytes([*zips, *old, native]),
        _damaged_zips(zips),
        damaged_pickles([*old, *_evil()]),
        _damaged_header(native),
        damaged_json([{"metadata": {"total_size": 1}, "weight_map": {"a": part.name, "b": path.name}}]),
    )
    yield Target(inputs=inputs, run=run, names=(str(folder),))


@contextmanager
def open_states(folder: Path) -> Iterator[Target]:
    """The bytes of a run's `state.pt`, which a trainer of the same run takes up."""
    output = folder / "run"
    trainer = make_trainer(write_pictures(folder / "data", count=2), output)
    trainer.save()
    path = output / "state.pt"
    content = torch.load(path, weights_only=True)
    first = dict(list(content["model"].items())[:2])
    seeds = [
        _saved({**content, "model": first, "optimizer": {"state": {}, "param_groups": []}}),
        path.read_bytes(),
    ]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        if not trainer.resume():
            raise CheckpointError(f"'{path}' is no state")

    yield Target(inputs=st.one_of(damaged_bytes(seeds), _damaged_zips(seeds)), run=run, names=(str(output),))


def _saved(content: Any, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def _bytes_of(write: Callable[[Path], object], path: Path) -> bytes:
    write(path)
    return path.read_bytes()


class _Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _evil() -> list[bytes]:
    """Pickles that run code for whoever lets them."""
    calls = (
        _Runs(eval, f"open({_CANARY!r}, 'w').close()"),
        _Runs(open, _CANARY, "w"),
        _Runs(exec, "import torch"),
        _Runs(getattr, b"x", "join"),
    )
    return [pickle.dumps({"model": call}, protocol=protocol) for call in calls for protocol in (2, 4)]


def _damaged_zips(seeds: list[bytes]) -> SearchStrategy[bytes]:
    """Give files of PyTorch whose pickle or other members were damaged, or left out."""
    opened = [_members(seed) for seed in seeds]
    pickles = damaged_pickles(
        [content for seed in opened for name, content in seed if name.endswith("data.pkl")] + _evil()
    )

    @st.composite
    def damaged(draw: DrawFn) -> bytes:
        members = dict(draw(st.sampled_from(opened)))
        name = draw(st.sampled_from(sorted(members)))
        kind = draw(st.sampled_from(("pickle", "pickle", "pickle", "content", "delete", "rename")))
        if kind == "pickle":
            name = next(name for name in members if name.endswith("data.pkl"))
            members[name] = draw(pickles)
        elif kind == "content":
            members[name] = draw(damaged_bytes([members[name][:4096]]))
        else:
            content = members.pop(name)
            if kind == "rename":
                members[draw(st.sampled_from(("x", name + "x", "../../" + _CANARY, "archive/data/9")))] = (
                    content
                )
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            for each, content in members.items():
                file.writestr(each, content)
        return stream.getvalue()

    return damaged()


def _members(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [(name, file.read(name)) for name in file.namelist()]


def _damaged_header(data: bytes) -> SearchStrategy[bytes]:
    """Give a safetensors file with another header of the right length."""
    (length,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    told = {
        key: json.loads(text)
        for key, text in header["__metadata__"].items()
        if key in ("config", "categories")
    }
    values = ["F64", "BF16", "F8_E4M3", "I64", [0, 0], [0, 4]]

    def joined(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + body

    def with_metadata(key: str) -> SearchStrategy[bytes]:
        def put(text: bytes) -> bytes:
            metadata = {**header["__metadata__"], key: text.decode(errors="replace")}
            return json.dumps({**header, "__metadata__": metadata}).encode()

        return damaged_json([told[key]]).map(put)

    settings = st.one_of(*(with_metadata(key) for key in told))
    return st.one_of(damaged_json([header], values=values), settings, settings).map(joined)
