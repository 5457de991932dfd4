"""Photographs to try a detector on: blood cells under a microscope, of the BCCD data set.

https://github.com/Shenggan/BCCD_Dataset, MIT licence (`bccd/LICENSE`), with their annotations in COCO layout.
"""

from __future__ import annotations

from pathlib import Path

PHOTOGRAPHS = Path(__file__).parent / "bccd"
"""A data set in COCO layout."""
PHOTOGRAPHS_SPLIT = "val2017"
PHOTOGRAPHS_CLASSES = ("RBC", "WBC", "Platelets")
"""What they show: red and white blood cells, and platelets."""


def photographs() -> list[Path]:
    """Return the files of the photographs, which no network that comes with the project was trained on."""
    return sorted((PHOTOGRAPHS / PHOTOGRAPHS_SPLIT).glob("*.jpg"))
