"""Files and directories appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from asag_deploy.atomic import atomic_directory, atomic_write
from asag_deploy.errors import OutputError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "picture.png"
    with atomic_write(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert (temporary.parent, temporary.suffix) == (target.parent, ".png")
    assert contents(tmp_path) == {"new/folder/picture.png": "whole"}


def test_file_replaces_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with atomic_write(str(tmp_path / "a.json")) as temporary:
        temporary.write_text("new")
    assert contents(tmp_path) == {"a.json": "new"}


def test_file_is_readable_by_whom_others_are(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    with atomic_write(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("bad"), FULL])
def test_file_is_left_as_it_was_on_any_failure(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "a.json").write_text("old")
    expected = OutputError if failure is FULL else type(failure)
    with pytest.raises(expected):
        _fail_in_file(tmp_path / "a.json", failure)
    assert contents(tmp_path) == {"a.json": "old"}


def test_full_disk_is_one_sentence(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    with pytest.raises(OutputError) as error, atomic_write(target):
        raise FULL
    assert str(error.value) == f"could not write '{target}': no space left on device"


def test_file_where_a_directory_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match="is a directory"), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("")
    assert contents(tmp_path) == {}


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match="could not write"), atomic_write(tmp_path / "a" / "b"):
        pytest.fail("the body must not run")


def test_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "bundle"
    with atomic_directory(target, overwrite=False, marker="m") as temporary:
        (temporary / "m").write_text("1")
        assert not target.exists()
    assert contents(tmp_path) == {"new/bundle/m": "1"}


def test_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with atomic_directory(tmp_path / "bundle", overwrite=False, marker="m") as temporary:
        (temporary / "m").write_text("1")
    assert contents(tmp_path) == {"bundle/m": "1"}


def test_directory_is_overwritten_on_request(tmp_path: Path) -> None:
    target = _directory(tmp_path / "bundle", "m", "old")
    with atomic_directory(target, overwrite=True, marker="m") as temporary:
        (temporary / "m").write_text("new")
    assert contents(tmp_path) == {"bundle/m": "new"}


@pytest.mark.parametrize(
    ("overwrite", "file", "message"),
    [
        (False, "m", "already exists"),
        (True, "thesis.txt", "holds files but no m, so it is not replaced"),
        (False, "thesis.txt", "holds files but no m, so it is not replaced"),
    ],
)
def test_directory_is_not_replaced(tmp_path: Path, overwrite: bool, file: str, message: str) -> None:
    target = _directory(tmp_path / "bundle", file, "old")
    with pytest.raises(OutputError, match=message), atomic_directory(target, overwrite=overwrite, marker="m"):
        pytest.fail("the body must not run")
    assert contents(tmp_path) == {f"bundle/{file}": "old"}


def test_directory_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("old")
    with (
        pytest.raises(OutputError, match="is not a directory"),
        atomic_directory(tmp_path / "bundle", overwrite=True, marker="m"),
    ):
        pytest.fail("the body must not run")
    assert contents(tmp_path) == {"bundle": "old"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("bad"), FULL])
@pytest.mark.parametrize("before", [None, "old"])
def test_directory_is_left_as_it_was_on_any_failure(
    tmp_path: Path, failure: BaseException, before: str | None
) -> None:
    if before is not None:
        _directory(tmp_path / "bundle", "m", before)
    expected = OutputError if failure is FULL else type(failure)
    with pytest.raises(expected):
        _fail_in_directory(tmp_path / "bundle", failure)
    assert contents(tmp_path) == ({} if before is None else {"bundle/m": before})
    assert len(list(tmp_path.iterdir())) == (0 if before is None else 1)


def test_directory_comes_back_if_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = _directory(tmp_path / "bundle", "m", "old")
    rename = Path.rename

    def fail_into_place(self: Path, to: Path) -> Path:
        if to == target and (self / "m").read_text() == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with (
        pytest.raises(OutputError, match="input/output error"),
        atomic_directory(target, overwrite=True, marker="m") as temporary,
    ):
        (temporary / "m").write_text("new")
    assert contents(tmp_path) == {"bundle/m": "old"}


def test_directory_made_by_somebody_else_meanwhile_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="already exists"),
        atomic_directory(tmp_path / "bundle", overwrite=False, marker="m") as temporary,
    ):
        _directory(temporary.parent / "bundle", "m", "theirs")
    assert contents(tmp_path) == {"bundle/m": "theirs"}


def _directory(path: Path, file: str, text: str) -> Path:
    path.mkdir()
    (path / file).write_text(text)
    return path


def _fail_in_file(path: Path, failure: BaseException) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise failure


def _fail_in_directory(path: Path, failure: BaseException) -> None:
    with atomic_directory(path, overwrite=True, marker="m") as temporary:
        (temporary / "m").write_text("half")
        raise failure
