"""Saying what is in files and folders that are no checkpoint, by how they begin or what lies in them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from asag_deploy.downloads import LFS_POINTER

HEAD_BYTES = 512
"""As much of a file as `what_else` wants to see."""

_STARTS: tuple[tuple[bytes, str], ...] = (
    (
        LFS_POINTER,
        "a pointer of Git LFS, not what it points to: run `git lfs pull` where it lies",
    ),
    (b"\x1f\x8b", "compressed by gzip: unpack it first, with `gunzip` or `tar -xzf`"),
    (b"BZh", "compressed by bzip2: unpack it first, with `bunzip2` or `tar -xjf`"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first, with `unxz` or `tar -xJf`"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first, with `unzstd`"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first, and give the checkpoint in it"),
    (b"Rar!", "a RAR archive: unpack it first, and give the checkpoint in it"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them: it holds no PyTorch weights"),
    (b"GGUF", "a GGUF file: it holds no PyTorch weights"),
    (b"\x93NUMPY", "a single NumPy array: save the weights by name, with safetensors or torch.save"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"ftrt", "a TensorRT engine, which holds no weights to read: give the checkpoint it was made from"),
)
_TFLITE = b"TFL3"
_WEB = re.compile(rb"\s*(<!doctype html|<html|<head|<\?xml[^>]*\?>\s*<!doctype html)", re.IGNORECASE)
_XML = re.compile(rb"\s*<\?xml")
_ONNX = re.compile(rb"\x08[\x01-\x20](\x12|\x1a|\x22|\x2a|\x32|\x3a|\x42)")
"""A protobuf that begins with a small number (the version) and goes on with text or a message."""
_TAR_AT, _TAR = 257, b"ustar"
_LINES = 3
"""Text begins in lines like these: what is not text has bytes that no text has."""


def what_else(start: bytes) -> str | None:
    """Say what a file that begins like this is, and what to do; None if nobody knows.

    start: its first `HEAD_BYTES` bytes, or fewer if it is shorter.
    """
    for beginning, what in _STARTS:
        if start.startswith(beginning):
            return what
    if start[4:8] == _TFLITE:
        return "a TensorFlow Lite model: it holds no PyTorch weights"
    if start[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR:
        return "a tar archive: unpack it first, with `tar -xf`, and give the checkpoint in it"
    if _WEB.match(start):
        return "a web page, as a download leaves that wanted a login or a confirmation: download it again"
    if _XML.match(start):
        return "an XML file, such as the graph of an OpenVINO model: give the checkpoint it was made from"
    if _ONNX.match(start):
        return "an ONNX graph, such as an export writes: give the checkpoint it was made from"
    return None


def what_archive(path: Path) -> str | None:
    """Say what a zip archive is that torch.save did not write; None if it did, or if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    found = set(names)
    if "archive_format" in found or "serialized_exported_program.json" in found:
        return "a program of torch.export (.pt2): save its weights with torch.save(model.state_dict(), ...)"
    if "constants.pkl" in found and any(name.startswith("code/") for name in names):
        return (
            "a TorchScript program: save its weights with torch.save(torch.jit.load(...).state_dict(), ...)"
        )
    if "data.pkl" in found:
        return None
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz): save the weights with safetensors or torch.save"
    if any(name.endswith((".pth", ".pt", ".ckpt", ".bin", ".safetensors")) for name in names):
        return "a zip archive: unpack it first, and give the checkpoint in it"
    return "a zip archive that torch.save did not write: it holds no weights that are known here"


def _what_shards(names: Sequence[str]) -> str | None:
    """Say which tool's checkpoint in shards a folder of these files is, and what to do; None if none."""
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "a distributed checkpoint in shards: make one file of it with "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`"
        )
    if any(name.startswith(("zero_pp_rank", "global_step", "mp_rank", "bf16_zero")) for name in names):
        return "a checkpoint of DeepSpeed in shards: make one file of it with the zero_to_fp32.py in it"
    return None


def what_folder(folder: Path) -> str:
    """Say what a folder holds that is given for a checkpoint, and what to give instead."""
    if (folder / "manifest.json").exists():
        return "a bundle, which holds graphs and no weights to read: give the checkpoint it was exported from"
    return what_checkpoints(folder) or "a directory; give the checkpoint file in it"


def what_checkpoints(folder: Path) -> str | None:
    """Say which checkpoints a folder that is no bundle holds, and what to give instead; None if none."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:  # whoever opens it says why
        return None
    if "manifest.json" in names:
        return None
    shards = _what_shards(names)
    if shards is not None:
        return shards
    if "saved_model.pb" in names:
        return "a TensorFlow model: it holds no PyTorch weights"
    if "data.pkl" in names or (folder / "archive" / "data.pkl").exists():
        return "an unpacked PyTorch file: give the file itself"
    files = [
        name
        for name in names
        if name.endswith((".safetensors", ".index.json", ".pth", ".pt", ".ckpt", ".bin"))
    ]
    if not files:
        return None
    return f"a directory; give the checkpoint file in it, such as '{folder / files[0]}'"
