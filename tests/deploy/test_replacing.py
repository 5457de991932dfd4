"""What may be replaced: what this project's programs made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from asag_deploy.errors import OutputError
from asag_deploy.replacing import check_own_file, check_own_folder, is_json_with

IS_OWN = is_json_with("command", "machine")


def test_a_file_is_known_by_what_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    check_own_file(None, IS_OWN, "figures")
    check_own_file(file, IS_OWN, "figures")
    for own in ("", json.dumps({"command": "x", "machine": {}, "more": 1})):
        file.write_text(own)
        check_own_file(file, IS_OWN, "figures")
    for foreign in ("x", "[]", '{"command": 1}', "[" * 100_000, "\ud800".encode("utf-16", "surrogatepass")):
        file.write_bytes(foreign if isinstance(foreign, bytes) else foreign.encode())
        with pytest.raises(OutputError, match="holds something else than figures, so it is not replaced"):
            check_own_file(file, IS_OWN, "figures")
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OutputError, match="holds something else"):
        check_own_file(tmp_path / "link", IS_OWN, "figures")


def test_devices_and_pipes_are_nobodys(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path(os.devnull), tmp_path):
        check_own_file(place, IS_OWN, "figures")


def test_a_folder_is_known_by_its_first_file(tmp_path: Path) -> None:
    names = ("result.json", "latency.png")
    check_own_folder(tmp_path / "new", names, IS_OWN, "figures")
    (tmp_path / "notes.txt").write_text("x")
    check_own_folder(tmp_path, names, IS_OWN, "figures")
    (tmp_path / "latency.png").write_text("x")
    with pytest.raises(OutputError, match=r"latency\.png' is there, but no 'result\.json' beside it"):
        check_own_folder(tmp_path, names, IS_OWN, "figures")
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(OutputError, match=r"result\.json' is there and holds something else than figures"):
        check_own_folder(tmp_path, names, IS_OWN, "figures")
    (tmp_path / "result.json").write_text('{"command": "", "machine": 0}')
    check_own_folder(tmp_path, names, IS_OWN, "figures")
