"""The trained networks that come with the project, and what their demo is shown on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent.parent

CHECKPOINT = _PACKAGE / "asag-a-scenes.safetensors"
"""The network that was trained on generated scenes; docs/train.md says how."""
TRAINED_FOR: dict[str, Any] = {"anchor_cap": 150, "max_detections": 100}
"""What that network was trained with; the demo exports it for more, which the crowds are shown with."""
PHOTOGRAPHS_CHECKPOINT = _PACKAGE / "asag-a-bccd.safetensors"
"""The network that was trained on photographs of blood cells; docs/train.md says how."""

SEED = 2
"""Of the scenes; the network was trained on those of seed 0, and its training was watched on those of 1."""
SIZE = 320
"""Width and height of the scenes in pixels."""
