"""The parts of generated scenes: shapes, their materials, and the ground they lie on.

Everything is drawn at `DETAIL` times the resolution of the picture and averaged down, so that edges are
smooth and boxes are exact to a fraction of a pixel.  Colours are RGB, float32, 0 to 1.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

DETAIL = 3

Rng = np.random.Generator
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

_SHIFT = 6
"""OpenCV takes coordinates as integers with this many fractional bits."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The points of a window of side n in the frame of the object in it."""

    x: Floats
    """(n, n) from -1 to 1 across the object, turned with it."""
    y: Floats
    radius: Floats
    """Distance to its centre."""
    angle: Floats
    """-pi to pi around it."""


@dataclass(frozen=True, kw_only=True)
class ObjectClass:
    """A class of objects: an outline and a material."""

    name: str
    outline: Callable[[int], list[Floats]]
    """Closed polygons (k, 2) in the object's frame, for objects of so many pixels; a second one is a hole."""
    shade: Callable[[Grid, Rng], Floats]
    """The material's pattern, (n, n), -1 (the dark tone) to 1 (the light one)."""
    hue: float
    """The middle of its hues, 0 to 1; objects vary around it."""
    stretch: float
    """The most that one axis is shorter than the other, as a part of it."""


def grid(side: int, half: float, turn: float, squeeze: float) -> Grid:
    """Return the window of `side` pixels around an object of `half` its extent, turned by `turn` radians."""
    line = (np.arange(side, dtype=np.float32) + 0.5 - side / 2) / half
    across, down = np.meshgrid(line, line)
    x = (across * np.cos(turn) + down * np.sin(turn)).astype(np.float32)
    y = ((down * np.cos(turn) - across * np.sin(turn)) / squeeze).astype(np.float32)
    return Grid(x=x, y=y, radius=np.hypot(x, y), angle=np.arctan2(y, x))


def outline_mask(shape: ObjectClass, side: int, half: float, turn: float, squeeze: float) -> Mask:
    """Return (side, side) where the object is, in a window around it."""
    canvas = np.zeros((side, side), dtype=np.uint8)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    for number, polygon in enumerate(shape.outline(round(half))):
        points = (polygon * [1, squeeze]) @ rotation.T * half + (side - 1) / 2
        fixed = np.round(points * (1 << _SHIFT)).astype(np.int32)
        cv2.fillPoly(canvas, [fixed], 255 if number == 0 else 0, cv2.LINE_8, _SHIFT)
    return canvas > 0


def paint(shape: ObjectClass, cells: Grid, rng: Rng) -> Floats:
    """Paint the object's colours (n, n, 3) over its window: pattern, light from the top left, dark rim."""
    hue = (shape.hue + rng.uniform(-0.035, 0.035)) % 1
    saturation, value = rng.uniform(0.55, 0.85), rng.uniform(0.75, 0.95)
    light = np.array(colorsys.hsv_to_rgb(hue, saturation * 0.55, min(value * 1.12, 1.0)), dtype=np.float32)
    dark = np.array(colorsys.hsv_to_rgb(hue, min(saturation * 1.15, 1.0), value * 0.5), dtype=np.float32)
    part = ((shape.shade(cells, rng) + 1) / 2)[..., None]
    return cast(Floats, dark + (light - dark) * part.clip(0, 1))


def lighting(mask: Mask) -> Floats:
    """Return (n, n) how much light falls on an object of this outline, bulging and lit from the top left."""
    side = mask.shape[0]
    inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)
    reach = max(float(inside.max()), 1.0)
    depth = np.minimum(inside / (0.45 * reach), 1.0)
    height = np.sqrt(np.maximum(1 - (1 - depth) ** 2, 0))
    blur = max(side / 40, 0.8)
    height = cv2.GaussianBlur(height.astype(np.float32), (0, 0), blur)
    slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3)
    slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3)
    facing = (slope_x + slope_y) * reach / 9
    return cast(Floats, (1 + 0.35 * np.tanh(facing) - 0.22 * (1 - depth)).astype(np.float32))


def background(height: int, width: int, rng: Rng) -> Floats:
    """Draw (height, width, 3) a muted ground: cloudy noise, fine grain, and darker corners."""
    hue, saturation = rng.uniform(0, 1), rng.uniform(0.05, 0.25)
    base = np.array(colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.35, 0.8)), dtype=np.float32)
    other = np.array(
        colorsys.hsv_to_rgb((hue + rng.uniform(-0.15, 0.15)) % 1, saturation, rng.uniform(0.3, 0.85)),
        dtype=np.float32,
    )
    clouds = fractal_noise(height, width, rng)[..., None]
    grain = rng.normal(0, 1, (height, width, 1)).astype(np.float32)
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    corners = (1 - 0.18 * (x**2 + y**2) / 2)[..., None].astype(np.float32)
    return cast(Floats, (base + (other - base) * clouds + 0.012 * grain) * corners)


def fractal_noise(height: int, width: int, rng: Rng) -> Floats:
    """Draw (height, width) smooth noise of several scales, 0 to 1."""
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(2, 7):
        cells = 1 << octave
        coarse = rng.uniform(-1, 1, (cells, max(round(cells * width / height), 1))).astype(np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 0.55 ** (octave - 2)
    return cast(Floats, ((total - total.min()) / max(float(np.ptp(total)), 1e-6)).astype(np.float32))


def _disc(pixels: int) -> list[Floats]:
    return [_circle(1.0)]


def _ring(pixels: int) -> list[Floats]:
    return [_circle(1.0), _circle(0.52)]


def _square(pixels: int) -> list[Floats]:
    return [np.array([(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)], dtype=np.float32)]


def _triangle(pixels: int) -> list[Floats]:
    angles = np.radians([-90, 30, 150])
    return [np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)]


def _star(pixels: int) -> list[Floats]:
    angles = np.radians(np.arange(10) * 36 - 90)
    reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.46)
    return [np.stack([reach * np.cos(angles), reach * np.sin(angles)], axis=1).astype(np.float32)]


def _circle(radius: float) -> Floats:
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _dots(cells: Grid, rng: Rng) -> Floats:
    """Draw light dots in rows, every other row shifted."""
    count = rng.uniform(1.6, 2.4)
    row = np.floor(cells.y * count)
    x, y = cells.x * count + 0.5 * (row % 2), cells.y * count
    distance = np.hypot(x - np.floor(x) - 0.5, y - row - 0.5)
    return cast(Floats, np.tanh((0.3 - distance) * 18) * 0.75)


def _checks(cells: Grid, rng: Rng) -> Floats:
    """Draw a chequerboard."""
    count = rng.uniform(3.2, 4.4)
    return cast(Floats, np.tanh(9 * np.sin(cells.x * count * 1.4) * np.sin(cells.y * count * 1.4)) * 0.7)


def _stripes(cells: Grid, rng: Rng) -> Floats:
    """Draw parallel stripes, level with the base."""
    return cast(Floats, np.tanh(5 * np.sin(cells.y * rng.uniform(9, 13))) * 0.7)


def _metal(cells: Grid, rng: Rng) -> Floats:
    """Draw polished metal: highlights that turn with the angle, and fine grooves."""
    gleam = np.sin(2 * cells.angle + rng.uniform(0, 6.3)) + 0.4 * np.sin(
        4 * cells.angle + rng.uniform(0, 6.3)
    )
    return cast(Floats, 0.75 * gleam + 0.18 * np.sin(cells.radius * 55) + 0.2)


def _glow(cells: Grid, rng: Rng) -> Floats:
    """Draw light in the middle and dark at the tips, with faint speckles."""
    side = len(cells.x)
    speckles = fractal_noise(side, side, rng) - 0.5
    return cast(Floats, 1.05 - 2.0 * cells.radius**0.8 + 0.8 * speckles)


CLASSES: tuple[ObjectClass, ...] = (
    ObjectClass(name="disc", outline=_disc, shade=_dots, hue=0.02, stretch=0.25),
    ObjectClass(name="square", outline=_square, shade=_checks, hue=0.58, stretch=0.3),
    ObjectClass(name="triangle", outline=_triangle, shade=_stripes, hue=0.37, stretch=0.2),
    ObjectClass(name="ring", outline=_ring, shade=_metal, hue=0.13, stretch=0.25),
    ObjectClass(name="star", outline=_star, shade=_glow, hue=0.82, stretch=0.1),
)
"""The classes in label order."""
