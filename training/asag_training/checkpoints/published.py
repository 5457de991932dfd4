"""The published files, and which of their parallel decoders the published AP is of."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from asag_training.checkpoints.checkpoint import Checkpoint
from asag_training.checkpoints.native import is_native_file
from asag_training.network.config import MAIN_HEAD


class PublishedFile(NamedTuple):
    """A file of the public code, without its ending, and what was published of it."""

    name: str
    variant: str
    head: str
    """The decoder that was measured."""
    ap: str
    """On COCO's val2017, or on CrowdHuman's validation images, where it is AP50."""


PUBLISHED_FILES = (
    PublishedFile("ASAG_A_r50_1x_100", "asag-a-r50-100", "aux_2", "42.6"),
    PublishedFile("ASAG_A_r50_1x_300", "asag-a-r50-300", "aux_2", "43.6"),
    PublishedFile("ASAG_A_r50_3x_100", "asag-a-r50-100", MAIN_HEAD, "45.3"),
    PublishedFile("ASAG_A_r50_3x_300", "asag-a-r50-300", "aux_2", "46.3"),
    PublishedFile("ASAG_A_r101_3x_300", "asag-a-r101-300", "aux_2", "47.5"),
    PublishedFile("ASAG_S_r50_3x_100", "asag-s-r50-100", "aux_2", "43.9"),
    PublishedFile("ASAG_S_r50_3x_300", "asag-s-r50-300", "aux_2", "45.0"),
    PublishedFile("ASAG_A_r50_1x_100_dn", "asag-a-r50-100", "aux_2", "43.1"),
    PublishedFile("ASAG_A_r50_1x_100_crosscl", "asag-a-r50-100", "aux_2", "43.8"),
    PublishedFile("ASAG_S_crowdhuman", "asag-s-r50-crowdhuman", "aux_0", "91.3 (AP50)"),
)


def about_heads(path: Path, checkpoint: Checkpoint, head: str | None) -> list[str]:
    """Say, in a sentence or none, which decoder of a public file is taken where none was asked for.

    `checkpoint` was loaded from `path` with all its decoders.
    """
    names = checkpoint.head_names
    if head is not None or len(names) == 1 or is_native_file(path):
        return []
    known = next((file for file in PUBLISHED_FILES if file.name.lower() == path.stem.lower()), None)
    taken = f"of its {len(names)} decoders '{MAIN_HEAD}' is taken"
    if known is None or known.head not in names:
        return [f"{taken}, and --head takes another: most published AP are of aux_2, see docs/export.md"]
    if known.head == MAIN_HEAD:
        return []
    other = f"its published AP, {known.ap}, is of '{known.head}': --head {known.head} takes that one"
    return [f"{taken}, but {other}"]
