"""The example pictures that come with the playground: which generated scenes they are.

    PYTHONPATH=.:training:tests python tests/support/playground_examples.py

draws them into asag_deploy/playground/examples anew.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_evaluation.data.scenes import Kind, draw

FOLDER = Path(__file__).parents[2] / "asag_deploy" / "playground" / "examples"
SEED = 2023
SIZE = 320
SCENES: dict[str, tuple[Kind, int]] = {
    "1-mixed.jpg": ("mixed", 3),
    "2-large.jpg": ("large", 1),
    "3-tiny.jpg": ("tiny", 2),
    "4-crowd.jpg": ("crowd", 0),
}
"""By file name, the kind of a scene and its number."""
_QUALITY = 92


def drawn(name: str) -> NDArray[np.uint8]:
    """The scene of an example, uint8 (H, W, 3) RGB."""
    kind, number = SCENES[name]
    return draw(SIZE, SIZE, SEED, number, (kind,)).image


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in SCENES:
        cv2.imwrite(str(FOLDER / name), drawn(name)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])


if __name__ == "__main__":
    main()
