"""The annotations of a file of the usual kind, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from asag_evaluation.data.values import LARGEST

NO_ID = -(2**63)
"""Stands for the id of an image or a class where an annotation names none; no list has it."""


class Columns(NamedTuple):
    """The columns of A annotations."""

    ids: NDArray[np.int64]
    """Of those that have one."""
    image_ids: NDArray[np.int64]
    """(A,)"""
    class_ids: NDArray[np.int64]
    """(A,)"""
    xywh: NDArray[np.float64]
    """(A, 4) x, y, w, h in pixels."""
    areas: NDArray[np.float64]
    """(A,) square pixels; those of the boxes where none are given."""
    crowds: NDArray[np.bool_]
    """(A,) whether it is a crowd, or to be ignored like one."""

    @classmethod
    def checked(
        cls,
        *,
        ids: list[Any],
        image_ids: list[Any],
        class_ids: list[Any],
        xywh: NDArray[np.float64],
        areas: list[Any],
        flags: Sequence[list[Any]],
    ) -> Self:
        """Make columns of what stands in a file.

        Raises ValueError, TypeError or OverflowError for ids that are no whole numbers, boxes and areas that
        are no measures, and flags other than 0, 1 and None, which any of a record's may set.
        """
        if not (np.abs(xywh) <= LARGEST).all():
            raise ValueError("a box has no measures")
        area = np.array(of_type(areas, int, float, type(None)), dtype=np.float64)  # None becomes NaN
        return cls(
            ids=_whole(ids),
            image_ids=_whole(image_ids),
            class_ids=_whole(class_ids),
            xywh=xywh,
            areas=np.where((area > 0) & (area <= LARGEST), area, xywh[:, 2] * xywh[:, 3]),
            crowds=np.logical_or.reduce([_flags(values) for values in flags]),
        )

    @classmethod
    def joined(cls, pieces: Sequence[Columns]) -> Self:
        """Return the columns of all pieces; of none, if there are none."""
        if not pieces:
            return cls.checked(
                ids=[], image_ids=[], class_ids=[], xywh=np.zeros((0, 4)), areas=[], flags=([],)
            )
        return cls(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


def of_type(values: list[Any], *types: type) -> list[Any]:
    """Return values that all are of one of these types; TypeError if they are not."""
    if not {*map(type, values)} <= {*types}:
        raise TypeError("a value is of another type")
    return values


def _whole(values: list[Any]) -> NDArray[np.int64]:
    numbers = np.array(of_type(values, int), dtype=np.int64)
    if (numbers == NO_ID).any():
        raise OverflowError("a number is too small")
    return numbers


def _flags(values: list[Any]) -> NDArray[np.bool_]:
    if not {*values} <= {0, 1, None}:
        raise ValueError("a flag is none")
    return np.array(values, dtype=np.bool_)
