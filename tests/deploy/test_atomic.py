"""Files and directories appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from asag_deploy import atomic, leftovers
from asag_deploy.atomic import (
    atomic_directory,
    atomic_write,
    atomic_write_text,
    check_spares,
    check_writable,
    check_writable_file,
    is_same_file,
    is_stdout,
)
from asag_deploy.errors import OutputError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


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
    with pytest.raises(OutputError, match="is a directory"), atomic_write(tmp_path / "a"):
        pytest.fail("the body must not run")
    assert contents(tmp_path) == {}


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match="could not write"), atomic_write(tmp_path / "a" / "b"):
        pytest.fail("the body must not run")
    with pytest.raises(OutputError, match="a' is no folder"):
        check_writable(tmp_path / "a")


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
    with (
        pytest.raises(OutputError, match="holds files, so"),
        atomic_directory(target, overwrite=True, marker=""),
    ):
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
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)  # as on a network file system

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


def test_a_directory_of_a_containers_image_is_filled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overlay file systems do not rename a directory that comes from a lower layer."""
    target = _directory(tmp_path / "bundle", "m", "old")
    (target / "parts").mkdir()
    (target / "parts" / "old").touch()
    rename = Path.rename

    def across_layers(self: Path, to: Path) -> Path:
        if self == target:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, to)

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", across_layers)
    with atomic_directory(target, overwrite=True, marker="m", parts=("parts/*",)) as temporary:
        (temporary / "m").write_text("new")
        (temporary / "parts").mkdir()
        (temporary / "parts" / "new").write_text("more")
    assert contents(tmp_path) == {"bundle/m": "new", "bundle/parts/new": "more"}
    assert names(tmp_path) == ["bundle"]


def test_directory_comes_back_after_a_kill_between_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = _directory(tmp_path / "bundle", "m", "old")
    target.rename(atomic._aside(target))
    with pytest.raises(ValueError, match="stop"):
        _fail_in_directory(target, ValueError("stop"))
    assert contents(tmp_path) == {"bundle/m": "old"}
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    with atomic_directory(target, overwrite=True, marker="m") as temporary:
        (temporary / "m").write_text("new")
    assert contents(tmp_path) == {"bundle/m": "new"}


def test_directory_made_by_somebody_else_meanwhile_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="already exists"),
        atomic_directory(tmp_path / "bundle", overwrite=False, marker="m") as temporary,
    ):
        _directory(temporary.parent / "bundle", "m", "theirs")
    assert contents(tmp_path) == {"bundle/m": "theirs"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.json").write_text("old")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "one").symlink_to("folder/a.json")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (tmp_path / "dangling").symlink_to("real/b.json")
    for name in ("two", "dangling"):
        atomic_write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "real" / "a.json").read_text() == (tmp_path / "real" / "b.json").read_text() == "new"
    with atomic_directory(tmp_path / "bundle-link", overwrite=False, marker="m") as temporary:
        (temporary / "m").write_text("1")
    (tmp_path / "current").symlink_to("bundle-link")
    with atomic_directory(tmp_path / "current", overwrite=True, marker="m") as temporary:
        (temporary / "m").write_text("2")
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "bundle-link" / "m").read_text() == "2"


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OutputError, match="too many levels of symbolic links"), atomic_write(tmp_path / "a"):
        pytest.fail("the body must not run")


def test_a_replaced_file_keeps_its_permissions_and_its_other_names_their_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "a.json").chmod(0o640)
    (tmp_path / "other").hardlink_to(tmp_path / "a.json")
    atomic_write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    assert contents(tmp_path) == {"a.json": "new", "other": "old"}


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        got: list[str] = []
        reader = threading.Thread(target=lambda got=got: got.append((tmp_path / "pipe").read_text()))
        reader.start()
        atomic_write_text(tmp_path / name, "whole" * 100_000)
        reader.join()
        assert got == ["whole" * 100_000]
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["link", "pipe"]


def test_a_device_and_a_socket(tmp_path: Path) -> None:
    atomic_write_text("/dev/null", "gone")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OutputError, match=r"could not write '/dev/full'"):
        atomic_write_text("/dev/full", "too much")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(OutputError, match="no such device or address"):
            atomic_write_text(tmp_path / "socket", "x")
    assert (tmp_path / "socket").is_socket()


def test_open_descriptors(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from asag_deploy.atomic import atomic_write_text, is_stdout\n"
        "print('before')\n"
        "atomic_write_text(sys.argv[1], 'content ')\n"
        "print(is_stdout(sys.argv[1]), is_stdout('/dev/null'), is_stdout('a.json'))\n"
    )
    for path, expected in (("/dev/stdout", "True False False"), ("/dev/fd/2", "False False False")):
        log = tmp_path / "log.txt"
        log.write_text("earlier ")
        with log.open("a") as file:
            command = [sys.executable, "-c", script, path]
            done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=True)
        text = log.read_text()
        assert text == f"earlier before\n{'content ' if path == '/dev/stdout' else ''}{expected}\n"
        assert done.stderr == ("" if path == "/dev/stdout" else "content ")
        assert names(tmp_path) == ["log.txt"]
    with pytest.raises(OutputError, match="bad file descriptor"):
        atomic_write_text("/dev/fd/987", "x")
    with Path("/dev/null").open() as reading, pytest.raises(OutputError, match="open for reading only"):
        atomic_write_text(f"/dev/fd/{reading.fileno()}", "x")


def test_names_as_long_as_they_may_be(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    for name in ("a" * (longest - 5) + ".json", "." + "b" * (longest - 1), "\N{SNOWMAN}" * (longest // 3)):
        atomic_write_text(tmp_path / name, "whole")
        with atomic_directory(tmp_path / "folders" / name, overwrite=False, marker="m") as temporary:
            (temporary / "m").write_text("1")
        assert (tmp_path / name).read_text() == "whole"


def test_a_file_in_a_folder_that_takes_no_new_ones(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old and longer")
    (tmp_path / "fixed.json").write_text("old")
    (tmp_path / "fixed.json").chmod(0o444)
    tmp_path.chmod(0o555)
    script = (
        "import os, sys\n"
        "from asag_deploy.atomic import atomic_write_text\n"
        "from asag_deploy.errors import OutputError\n"
        "if os.getuid() == 0:\n"
        "    os.chown('a.json', 12345, 12345)\n"
        "    os.setuid(12345)\n"
        "atomic_write_text('a.json', 'new')\n"
        "for name in ('fixed.json', 'b.json'):\n"
        "    try:\n"
        "        atomic_write_text(name, 'new')\n"
        "    except OutputError as error:\n"
        "        print(error)\n"
    )
    others = Path(tempfile.gettempdir())
    for folder in (tmp_path, *(above for above in tmp_path.parents if others in above.parents)):
        folder.chmod(folder.stat().st_mode | 0o055)
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
        )
    finally:
        tmp_path.chmod(0o755)
    refused = [f"could not write '{name}': permission denied" for name in ("fixed.json", "b.json")]
    assert done.stdout.splitlines() == refused
    assert contents(tmp_path) == {"a.json": "new", "fixed.json": "old"}


def test_a_directory_that_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory; mount points are treated alike."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for text in ("1", "2"):
        with atomic_directory(".", overwrite=True, marker="m", parts=["*.onnx"]) as temporary:
            for name in ("m", f"{text}.onnx"):
                (temporary / name).write_text(text)
            (temporary / "folder").mkdir()
        assert names(tmp_path / "here") == [f"{text}.onnx", "folder", "m"]
    assert names(tmp_path) == ["here"]


def test_a_directory_with_something_that_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    target = _directory(tmp_path / "bundle", "m", "old")
    (target / "notes").mkdir()
    (target / "notes" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(OutputError, match=r"also holds 'notes/thesis\.txt', which would be lost"),
        atomic_directory(target, overwrite=True, marker="m", parts=["*.onnx"]),
    ):
        pytest.fail("the body must not run")
    assert contents(tmp_path) == {"bundle/m": "old", "bundle/notes/thesis.txt": "years of work"}


_KILLED = """
import sys, time
from pathlib import Path
from asag_deploy.atomic import atomic_directory, atomic_write
folder = Path(sys.argv[1])
with (
    atomic_write(folder / "state.pt") as file,
    atomic_directory(folder / "bundle", overwrite=True, marker="m") as directory,
):
    file.write_text("half")
    (directory / "m").write_text("half")
    print("written", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_leaves_the_next_one_removes(tmp_path: Path) -> None:
    (tmp_path / ".hidden.pt").write_text("of the user")
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            alive = set(names(tmp_path))
            assert len(alive) == 3
            atomic_write_text(tmp_path / "other.json", "1")
            assert alive < set(names(tmp_path))  # whoever is at work is left alone
        finally:
            os.kill(process.pid, signal.SIGKILL)
    leftovers.forget()
    atomic_write_text(tmp_path / "other.json", "2")
    assert contents(tmp_path) == {".hidden.pt": "of the user", "other.json": "2"}
    assert len(names(tmp_path)) == 2


def test_what_is_left_of_another_machine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leftovers, "_this_machine", lambda: ("0" * 8, "1" * 8))
    theirs = leftovers.Hidden(tmp_path / "state.pt")
    assert theirs._lock is not None
    os.close(theirs._lock)
    monkeypatch.undo()
    for text in ("1", "2"):
        leftovers.forget()
        atomic_write_text(tmp_path / "a.json", text)
    assert theirs.path.exists()
    assert [record.getMessage().split("'")[1] for record in caplog.records] == [str(theirs.path)]


def test_the_same_file_by_two_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to("new")
    assert is_same_file(tmp_path / "a", tmp_path / "b")
    assert is_same_file(tmp_path / "c", tmp_path / "new")
    assert not is_same_file(tmp_path / "a", tmp_path / "c")
    assert not is_stdout(tmp_path / "a")


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


def test_what_could_not_be_written_is_said_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    check_writable(tmp_path / "results" / "of-today")
    check_writable_file(tmp_path / "file")
    check_writable_file("/dev/null")
    check_writable_file(None)
    for check, path in (
        (check_writable, tmp_path / "file"),
        (check_writable_file, tmp_path / "file" / "a.json"),
        (check_writable_file, tmp_path / "results"),
        (check_writable, Path("/proc/nowhere")),
    ):
        with pytest.raises(OutputError, match=f"could not write '{path}'"):
            check(path)
    assert contents(tmp_path) == {"file": "old"}
    assert names(tmp_path / "results") == ["of-today"]


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "a.pth").write_text("weights")
    (tmp_path / "link").symlink_to("bundle/a.pth")
    check_spares(tmp_path / "new", tmp_path / "bundle", None)
    check_spares(tmp_path / "bundle" / "int8", tmp_path / "bundle")
    for output, given in (
        ("bundle", "bundle"),
        ("link", "bundle/a.pth"),
        ("bundle", "link"),
        ("bundle/../bundle", "bundle/a.pth"),
    ):
        with pytest.raises(OutputError, match="which is read: choose another place"):
            check_spares(tmp_path / output, tmp_path / given)
