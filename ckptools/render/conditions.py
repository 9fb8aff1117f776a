"""Pictures for ControlNets, drawn from scratch at any size; and the edges of a given picture.

They are to show whether a ControlNet works: each is easily seen again in what is drawn after it.
Knows numpy alone: no models, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ckptools.errors import UsageError, nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Pixels = NDArray[np.uint8]

_TAN = np.tan(np.pi / 8)  # of 22.5°: between two of Canny's directions
_DRAWN_AT = 512  # the size that line widths are given for


def draw_condition(kind: str, size: tuple[int, int]) -> Pixels:
    """One of `CONDITIONS`, (width, height) → (height, width, 3) uint8; any other is a `UsageError`.

    edges   white outlines of a star on black, a pixel wide
    depth   a ball and a box before a wall: white is near, and values go with 1 / distance, as
            MiDaS gives them (Ranftl et al. 2020, arXiv 1907.01341)
    normal  the same scene: red is to the left, green up, blue towards the eye, 128 is zero
            (the protocol of ControlNet 1.1's normalbae)
    lines   the straight edges of a room, white on black, as M-LSD finds them
    pose    a person who waves: joints and limbs in OpenPose's colours (COCO's 18 points)
    """
    if kind not in _DRAWERS:
        raise UsageError(f"no condition {kind!r} to draw", fix=nearest(kind, CONDITIONS))
    return _DRAWERS[kind](size)


def find_edges(picture: Pixels, *, low: int = 100, high: int = 200) -> Pixels:
    """White edges, a pixel wide, of a picture (height, width, 3) uint8; same shape.

    low, high  of the gradient |dx| + |dy| by Sobel's 3 x 3 filters, 0 to 2040 in the channel where
               it is largest: above `high` is an edge, and above `low` what is joined to one

    Source: Canny 1986, "A computational approach to edge detection", without its blur and with four
    directions, as OpenCV's `Canny` has them; ControlNet's detector calls that with 100 and 200.
    """
    values = np.pad(picture.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    down = values[:-2] + 2 * values[1:-1] + values[2:]
    across = values[:, :-2] + 2 * values[:, 1:-1] + values[:, 2:]
    dx, dy = down[:, 2:] - down[:, :-2], across[2:] - across[:-2]
    best = (np.abs(dx) + np.abs(dy)).argmax(axis=2)[..., None]
    dx, dy = (np.take_along_axis(slope, best, axis=2)[..., 0] for slope in (dx, dy))
    ridge = np.pad(_ridges(dx, dy), 1)
    size = np.pad(np.abs(dx) + np.abs(dy), 1)
    edges = _joined(ridge & (size > high), ridge & (size > low))[1:-1, 1:-1]
    return _grey(np.where(edges, 255, 0))


def _ridges(dx: NDArray[np.int32], dy: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where the gradient is the largest along its own direction, the nearest of four."""
    size = np.abs(dx) + np.abs(dy)
    padded = np.pad(size, 1)
    height, width = size.shape

    def beside(rows: int, columns: int) -> NDArray[np.int32]:
        return padded[1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    flat, steep = np.abs(dy) < _TAN * np.abs(dx), np.abs(dy) * _TAN > np.abs(dx)
    falls = (dx ^ dy) < 0  # the signs differ: the slope runs from the lower left
    ways = (
        (flat, beside(0, -1), size >= beside(0, 1)),
        (steep, beside(-1, 0), size >= beside(1, 0)),
        (~flat & ~steep & ~falls, beside(-1, -1), size > beside(1, 1)),
        (~flat & ~steep & falls, beside(-1, 1), size > beside(1, -1)),
    )
    found = np.zeros(size.shape, bool)
    for way, before, not_less in ways:
        found |= way & (size > before) & not_less
    return found


def _joined(strong: NDArray[np.bool_], weak: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The strong pixels, and the weak ones that touch them or each other; borders are blank."""
    found = strong.ravel().copy()
    open_weak = weak.ravel() & ~found
    width = strong.shape[1]
    steps = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    front = np.flatnonzero(found)
    while front.size:
        near = np.unique(front[:, None] + steps)
        front = near[open_weak[near]]
        found[front], open_weak[front] = True, False
    return found.reshape(strong.shape)


def _grey(values: NDArray[np.generic]) -> Pixels:
    """(height, width) of 0 to 255 as a picture."""
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=2)


def _plane(size: tuple[int, int]) -> tuple[Floats, Floats]:
    """(x, y) of the pixels' middles: 0 in the middle, y up, the shorter side from -1 to 1."""
    width, height = size
    half = min(width, height) / 2
    x = (np.arange(width) + 0.5 - width / 2) / half
    y = (height / 2 - np.arange(height) - 0.5) / half
    return np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width))


# --- a star --------------------------------------------------------------------------------------


def _star_edges(size: tuple[int, int]) -> Pixels:
    return find_edges(_grey(np.where(star(size), 255, 0)))


def star(size: tuple[int, int]) -> NDArray[np.bool_]:
    """Where the star is whose outlines are the condition "edges", (height, width)."""
    x, y = _plane(size)
    y = y + 0.06  # its points reach higher than its feet go down
    turn = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, y) + turn / 2) % turn - turn / 2)  # from the nearest point's axis
    radius = np.hypot(x, y)
    along, aside = radius * np.cos(angle), radius * np.sin(angle)
    outer, inner = 0.72, 0.34
    foot, side = inner * np.cos(turn / 2), inner * np.sin(turn / 2)
    return np.asarray(side * (along - outer) + (outer - foot) * aside <= 0.0, bool)


# --- a scene -------------------------------------------------------------------------------------

_FOCAL = 1.6  # distance of the plane whose shorter side is 2
_FLOOR, _WALL = -1.0, 7.0
_BALL, _RADIUS = np.array([-0.65, -0.3, 2.8]), 0.7
_BOX = (np.array([0.3, -1.0, 2.6]), np.array([1.2, 0.45, 3.4]))


def _scene(size: tuple[int, int]) -> tuple[Floats, Floats]:
    """(distance along the axis (h, w), normals (h, w, 3): right, up, away) of what is seen."""
    x, y = _plane(size)
    rays = np.stack([x, y, np.full(x.shape, _FOCAL)], axis=2)
    normals = np.zeros(rays.shape)
    nearest_at = _WALL / rays[..., 2]
    normals[..., 2] = -1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        for at, normal in (_floor(rays), _ball(rays), _box(rays)):
            seen = at < nearest_at  # NaN is nowhere
            nearest_at = np.where(seen, at, nearest_at)
            normals = np.where(seen[..., None], normal, normals)
    return nearest_at * rays[..., 2], normals


def _floor(rays: Floats) -> tuple[Floats, Floats]:
    at = _FLOOR / rays[..., 1]
    return np.where(at > 0, at, np.inf), np.array([0.0, 1.0, 0.0])


def _ball(rays: Floats) -> tuple[Floats, Floats]:
    """The nearer root of |t * ray - middle|² = radius²."""
    a, b = (rays * rays).sum(axis=2), rays @ _BALL
    root = np.sqrt(b * b - a * (_BALL @ _BALL - _RADIUS**2))
    at = (b - root) / a
    return at, (rays * at[..., None] - _BALL) / _RADIUS


def _box(rays: Floats) -> tuple[Floats, Floats]:
    """Where a ray has entered all three pairs of planes before it leaves one."""
    low, high = (corner / rays for corner in _BOX)
    enter, leave = np.minimum(low, high), np.maximum(low, high)
    at = enter.max(axis=2)
    side = enter.argmax(axis=2)
    normal = np.eye(3)[side] * -np.sign(np.take_along_axis(rays, side[..., None], axis=2))
    return np.where(at < leave.min(axis=2), at, np.inf), normal


def _depth(size: tuple[int, int]) -> Pixels:
    near = 1 / _scene(size)[0]
    return _grey((255 * (near - near.min()) / np.ptp(near)).round())


def _normal(size: tuple[int, int]) -> Pixels:
    normals = _scene(size)[1] * (-1, 1, -1)  # left, up, towards the eye
    return np.asarray((127.5 + 127.5 * normals).round(), np.uint8)


# --- lines ---------------------------------------------------------------------------------------


def _room(size: tuple[int, int]) -> Pixels:
    """A room seen from its middle: back wall, corners, a window, a door, boards on the floor."""
    width, height = size
    right, top = width / min(size), height / min(size)
    wall = np.array([0.5 * right, 0.45 * top])
    corners = [wall * sign for sign in ((-1, 1), (1, 1), (1, -1), (-1, -1))]
    lines = [(one, other) for one, other in zip(corners, [*corners[1:], corners[0]], strict=True)]
    lines += [(corner, corner * 3) for corner in corners]
    lines += _frame(wall * (-0.55, -0.1), wall * (0.05, 0.65))
    lines += _frame(wall * (0.4, -1.0), wall * (0.8, 0.35))
    feet = [wall * (share, -1) for share in (-0.5, 0.0, 0.5)]
    lines += [(foot, foot * 3) for foot in feet]
    x, y = _plane(size)
    thick = 2.001 * max(1.0, min(size) / _DRAWN_AT) / min(size)  # no line falls between pixels
    drawn = np.zeros(x.shape, bool)
    for one, other in lines:
        along, across, length = _beside(x, y, one, other)
        drawn |= (np.abs(along) <= length / 2) & (np.abs(across) <= thick / 2)
    return _grey(np.where(drawn, 255, 0))


def _frame(low: Floats, high: Floats) -> list[tuple[Floats, Floats]]:
    corners = [low, np.array([high[0], low[1]]), high, np.array([low[0], high[1]])]
    return list(zip(corners, [*corners[1:], corners[0]], strict=True))


def _beside(x: Floats, y: Floats, one: Floats, other: Floats) -> tuple[Floats, Floats, float]:
    """(along, across a line, from its middle; its length)."""
    way = other - one
    length = float(np.hypot(*way))
    (cos, sin), middle = way / length, (one + other) / 2
    right, up = x - middle[0], y - middle[1]
    return right * cos + up * sin, up * cos - right * sin, length


# --- a person ------------------------------------------------------------------------------------

# COCO's points in OpenPose's order, y up: nose, neck, right shoulder, elbow, wrist, left shoulder,
# elbow, wrist, right hip, knee, ankle, left hip, knee, ankle, right eye, left eye, right ear, left
# ear. Her right is on the picture's left.
_JOINTS = np.array([
    (0.0, 0.62), (0.0, 0.45), (-0.17, 0.45), (-0.36, 0.52), (-0.40, 0.78), (0.17, 0.45),
    (0.25, 0.2), (0.27, -0.03), (-0.1, 0.0), (-0.12, -0.42), (-0.13, -0.84), (0.1, 0.0),
    (0.12, -0.42), (0.14, -0.84), (-0.04, 0.67), (0.04, 0.67), (-0.09, 0.64), (0.09, 0.64),
])  # fmt: skip
# In the order of their colours, which go round the circle of hues in 18 steps. Source: the limbs
# and colours of OpenPose's COCO model, as ControlNet's annotator draws them.
_LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11),
          (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17))  # fmt: skip
_LIMB_SHARE = 0.6  # of a limb's colour
_LIMB_PX, _JOINT_PX = 4.0, 4.0  # half a limb's width, a joint's radius


def _person(size: tuple[int, int]) -> Pixels:
    x, y = _plane(size)
    drawn = np.zeros((*x.shape, 3))
    pixel = 2 / min(size)
    scale = max(1.0, min(size) / _DRAWN_AT * _LIMB_PX) * pixel
    for number, (one, other) in enumerate(_LIMBS):
        along, across, length = _beside(x, y, _JOINTS[one], _JOINTS[other])
        inside = (along / (length / 2)) ** 2 + (across / scale) ** 2 <= 1
        drawn[inside] = _hue(number) * _LIMB_SHARE
    radius = max(1.0, min(size) / _DRAWN_AT * _JOINT_PX) * pixel
    for number, (right, up) in enumerate(_JOINTS):
        drawn[np.hypot(x - right, y - up) <= radius] = _hue(number)
    return np.asarray(drawn.round(), np.uint8)


def _hue(number: int) -> Floats:
    """The full colour at 20° times a number: red, orange, yellow …"""
    pure = np.array([0, 2, 4])  # red, green and blue, in steps of 60°
    away = np.abs((number / 3 - pure + 3) % 6 - 3)
    return np.asarray(np.round(255 * np.clip(2 - away, 0, 1)), np.float64)


_DRAWERS: Mapping[str, Callable[[tuple[int, int]], Pixels]] = MappingProxyType(
    {"edges": _star_edges, "depth": _depth, "normal": _normal, "lines": _room, "pose": _person}
)
CONDITIONS = tuple(_DRAWERS)
