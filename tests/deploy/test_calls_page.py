"""docs/calls.md says what there is."""

from __future__ import annotations

import re
from pathlib import Path

from asag_deploy.call_options import OPTION_NAMES
from asag_export.demo.crowds import CAPS, MOST_DETECTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "calls.md").read_text(encoding="utf-8")


def test_every_option_has_a_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows == list(OPTION_NAMES)


def test_the_table_of_caps_is_the_demos() -> None:
    rows = re.findall(r"^\| (\d+)(?:, as trained)? \| (\d+)(?:, as trained)? \| 0", PAGE, re.MULTILINE)
    caps = [(150, 100), *((cap, MOST_DETECTIONS) for cap in CAPS)]
    assert [(int(cap), int(most)) for cap, most in rows] == caps
