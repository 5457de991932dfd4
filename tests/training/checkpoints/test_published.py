"""The published files, and which of their decoders is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from asag_training.checkpoints import Checkpoint
from asag_training.checkpoints.published import PUBLISHED_FILES, PublishedFile, about_heads
from asag_training.network.config import VARIANTS
from support.small_network import small_checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return small_checkpoint("asag-a-r50-100")


def test_ten_files_were_published() -> None:
    assert len({file.name for file in PUBLISHED_FILES}) == 10
    for file in PUBLISHED_FILES:
        assert file.head in VARIANTS[file.variant].head_names


def test_the_table_of_the_page() -> None:
    text = (Path(__file__).parents[3] / "docs" / "export.md").read_text(encoding="utf-8")
    for file in PUBLISHED_FILES:
        assert f"| `{file.name}` | `{file.variant}` | `{file.head}` | {file.ap} |" in text


@pytest.mark.parametrize("file", PUBLISHED_FILES, ids=lambda file: file.name)
def test_a_published_file_by_its_name(file: PublishedFile, checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / f"{file.name}.pth"
    path.touch()
    notes = about_heads(path, checkpoint, None)
    if file.head == "main":
        assert notes == []
    else:
        [note] = notes
        assert note.startswith("of its 4 decoders 'main' is taken, but its published AP, ")
        assert f"{file.ap}, is of '{file.head}': --head {file.head} takes that one" in note
    assert about_heads(path, checkpoint, "aux_1") == []
    path.rename(path.with_stem("mine"))
    [note] = about_heads(path.with_stem("mine"), checkpoint, None)
    assert "'main' is taken, and --head takes another: most published AP are of aux_2" in note
