"""Curves as pictures: panels of lines with axes, ticks, markers and names, drawn with Pillow.

Knows numbers and words only; what they mean is the caller's affair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Point = tuple[float, float]

# Okabe and Ito's colours, which colour-blind people tell apart; markers tell them apart as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_PAGE, _INK, _SOFT, _GRID = "#ffffff", "#1b1f24", "#5b6570", "#e3e6ea"
_SCALE = 3  # drawn so many times larger, then scaled down: Pillow's lines have hard edges
_WIDTH, _HEIGHT = 470, 380  # of a panel, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 46, 62, 58  # around its axes
_HEAD, _TEXT, _SMALL = 19, 15, 13


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    points  by x; where y is not a number the line is broken
    style   number of its colour and marker
    dashed  without markers: a level to compare with
    """

    label: str
    points: tuple[Point, ...]
    style: int
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines over common axes; y begins at 0."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


def draw_panels(rows: Sequence[Sequence[Panel]], *, title: str = "", note: str = "") -> Image:
    """Panels in rows and columns, as one picture.

    title  above all
    note   a line below it, smaller
    """
    from PIL import Image, ImageDraw

    columns = max(len(row) for row in rows)
    top = 20 + (34 if title else 0) + (24 if note else 0)
    size = columns * _WIDTH + 20, top + len(rows) * _HEIGHT + 10
    picture = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), _PAGE)
    pen = _Pen(ImageDraw.Draw(picture))
    if title:
        pen.text((24, 18), _fitting(title, size[0] - 48, 23), 23)
    if note:
        pen.text((24, 52), _fitting(note, size[0] - 48, _TEXT), _TEXT, _SOFT)
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            _draw_panel(pen, panel, 10 + column * _WIDTH, top + number * _HEIGHT)
    return picture.resize(size, Image.Resampling.LANCZOS)


def ticks(low: float, high: float, *, most: int = 6) -> tuple[float, ...]:
    """Round numbers that cover a range: multiples of 1, 2, 2.5 or 5 times a power of ten.

    At most `most` steps; the first is at or below `low`, the last at or above `high`.
    """
    span = high - low if high > low else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(f * power for f in (1, 2, 2.5, 5, 10, 20, 25) if span <= f * power * most * 1.0001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(number * step for number in range(first, max(last, first + 1) + 1))


# --- one panel ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axes:
    """Where numbers lie in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    box: tuple[float, float, float, float]

    def at(self, point: Point) -> Point:
        left, top, right, bottom = self.box
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return left + across * (right - left), bottom - up * (bottom - top)


def _draw_panel(pen: _Pen, panel: Panel, left: float, top: float) -> None:
    points = [p for line in panel.lines for p in line.points if math.isfinite(p[1])] or [(0.0, 0.0)]
    xs = [x for x, _ in points]
    x_ticks = ticks(min(xs), max(xs), most=5)
    y_ticks = ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    box = left + _LEFT, top + _TOP, left + _WIDTH - _RIGHT, top + _HEIGHT - _BOTTOM
    axes = _Axes((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), box)
    pen.text((box[0], top + 4), _fitting(panel.title, box[2] - box[0] + _RIGHT, _HEAD), _HEAD)
    pen.text((box[0], top + 30), panel.y_label, _SMALL, _SOFT)
    pen.text(((box[0] + box[2]) / 2, box[3] + 28), panel.x_label, _TEXT, _INK, "ma")
    for y in y_ticks:
        spot = axes.at((axes.x[0], y))
        pen.line([spot, (box[2], spot[1])], _GRID, 1)
        pen.text((spot[0] - 8, spot[1]), f"{y:.6g}", _SMALL, _SOFT, "rm")
    for x in x_ticks:
        spot = axes.at((x, axes.y[0]))
        pen.line([spot, (spot[0], spot[1] + 5)], _SOFT, 1)
        pen.text((spot[0], spot[1] + 9), f"{x:.6g}", _SMALL, _SOFT, "ma")
    pen.line([(box[0], box[1]), (box[0], box[3]), (box[2], box[3])], _SOFT, 1)
    for line in sorted(panel.lines, key=lambda line: not line.dashed):
        _draw_line(pen, line, axes)
    _name_lines(pen, panel.lines, axes)


def _draw_line(pen: _Pen, line: Line, axes: _Axes) -> None:
    colour = COLOURS[line.style % len(COLOURS)]
    spots = [axes.at(point) if math.isfinite(point[1]) else None for point in line.points]
    for one, other in pairwise(spots):
        if one is None or other is None:
            continue
        for part in _dashes(one, other) if line.dashed else [(one, other)]:
            pen.line(list(part), colour, 1.4 if line.dashed else 2.4)
    if not line.dashed:
        for spot in spots:
            if spot is not None:
                pen.marker(spot, line.style, colour)


def _dashes(one: Point, other: Point) -> Iterator[tuple[Point, Point]]:
    length = math.dist(one, other)
    for start in range(0, int(length) + 1, 9):
        low, high = start / (length or 1), min(start + 5, length) / (length or 1)
        yield _between(one, other, low), _between(one, other, high)


def _between(one: Point, other: Point, share: float) -> Point:
    return one[0] + (other[0] - one[0]) * share, one[1] + (other[1] - one[1]) * share


def _name_lines(pen: _Pen, lines: Sequence[Line], axes: _Axes) -> None:
    """Names at the lines' right ends, moved apart where they would meet."""
    ends = []
    for line in lines:
        found = [point for point in line.points if math.isfinite(point[1])]
        if found and not line.dashed:
            ends.append((axes.at(found[-1])[1], line))
    lowest = math.inf
    for y, line in sorted(ends, key=lambda end: -end[0]):
        lowest = min(y, lowest - _TEXT - 2)
        colour = COLOURS[line.style % len(COLOURS)]
        pen.text((axes.box[2] + 10, lowest), _fitting(line.label, _RIGHT - 12, _TEXT), _TEXT,
                 colour, "lm")  # fmt: skip


# --- pen ----------------------------------------------------------------------------------------


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)  # Aileron, inside Pillow


def _fitting(text: str, width: float, size: int) -> str:
    """As much of a line as fits; control characters are left out."""
    text = "".join(char if char.isprintable() else " " for char in text)
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@dataclass(frozen=True)
class _Pen:
    """Draws in the final picture's pixels on the larger one."""

    draw: ImageDraw

    def line(self, points: Sequence[Point], colour: str, width: float) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self.draw.line(scaled, fill=colour, width=round(width * _SCALE), joint="curve")

    def text(self, at: Point, text: str, size: int, colour: str = _INK, anchor: str = "la") -> None:
        spot = at[0] * _SCALE, at[1] * _SCALE
        self.draw.text(spot, text, fill=colour, font=_font(size * _SCALE), anchor=anchor)

    def marker(self, at: Point, style: int, colour: str) -> None:
        """A circle, square, triangle or diamond."""
        x, y = at[0] * _SCALE, at[1] * _SCALE
        r = 4.6 * _SCALE
        shapes = (
            None,
            [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)],
            [(x, y - r * 1.2), (x + r * 1.1, y + r), (x - r * 1.1, y + r)],
            [(x, y - r * 1.3), (x + r * 1.3, y), (x, y + r * 1.3), (x - r * 1.3, y)],
        )
        shape = shapes[style % len(shapes)]
        if shape is None:
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        else:
            self.draw.polygon(shape, fill=colour)
