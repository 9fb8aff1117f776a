"""Contact sheets: pictures in rows and columns, labelled, as one picture.

Knows arrays and words only; what they mean is the caller's affair.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_SMALLEST, _LARGEST = 192, 512  # sides of a cell, in pixels: below, labels find no room
_MOST_PIXELS = 60_000_000  # of a whole sheet: larger ones open slowly everywhere
_LONGEST = 30_000  # of its sides, cells alone
_GAP, _MARGIN, _FRAME = 12, 24, 5
_ROW_LABEL = 230  # width of the words beside a row
_PAGE, _INK, _SOFT, _EMPTY, _BAD = "#ffffff", "#1b1f24", "#5b6570", "#eceef1", "#c62828"
_TITLE, _HEAD, _TEXT = 24, 19, 15  # sizes of type, in pixels


def contact_sheet(
    pictures: Sequence[Sequence[NDArray[np.uint8] | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    failed: Collection[tuple[int, int]] = (),
) -> Image:
    """One picture of many: `pictures[row][column]`, each (height, width, 3) uint8, None: empty.

    rows, columns  labels; the first line is set larger, the others below it smaller. Any text
                   will do: long lines are folded, then cut
    title          above all
    failed         (row, column) of cells that get a red frame

    Small pictures are enlarged by a whole number, without smoothing; large ones are scaled down.
    """
    from PIL import Image, ImageDraw

    cell = _cell_size(pictures)
    heads = [_Label(text, cell[0], 3) for text in columns]
    sides = [_Label(text, _ROW_LABEL, max(3, cell[1] // (_TEXT + 5))) for text in rows]
    left = _MARGIN + (_ROW_LABEL + _GAP if any(rows) else 0)
    width = left + len(columns) * (cell[0] + _GAP) - _GAP + _MARGIN
    above = _Label(title, width - 2 * _MARGIN, 2, _TITLE)
    top = _MARGIN + (above.height + _GAP if title else 0)
    first = top + (max((head.height for head in heads), default=0) + _GAP // 2)
    height = first + len(rows) * (cell[1] + _GAP) - _GAP + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAGE)
    pen = ImageDraw.Draw(sheet)
    above.draw(pen, _MARGIN, _MARGIN)
    for column, head in enumerate(heads):
        head.draw(pen, left + column * (cell[0] + _GAP), top)
    for row, side in enumerate(sides):
        y = first + row * (cell[1] + _GAP)
        side.draw(pen, _MARGIN, y)
        for column in range(len(columns)):
            x = left + column * (cell[0] + _GAP)
            box = (x, y, x + cell[0] - 1, y + cell[1] - 1)
            pixels = pictures[row][column]
            if pixels is None:
                pen.rectangle(box, fill=_EMPTY)
            else:
                shown = scaled(pixels, cell)
                inset = (cell[0] - shown.width) // 2, (cell[1] - shown.height) // 2
                sheet.paste(shown, (x + inset[0], y + inset[1]))
            if (row, column) in failed:
                around = (box[0] - _FRAME, box[1] - _FRAME, box[2] + _FRAME, box[3] + _FRAME)
                pen.rectangle(around, outline=_BAD, width=_FRAME)
    return sheet


def scaled(pixels: NDArray[np.uint8], cell: tuple[int, int]) -> Image:
    """A picture as large as fits into (width, height), in its own proportions."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(pixels))
    factor = min(cell[0] / picture.width, cell[1] / picture.height)
    if factor >= 1:
        whole = int(factor)
        return picture.resize(
            (picture.width * whole, picture.height * whole), Image.Resampling.NEAREST
        )
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _cell_size(pictures: Sequence[Sequence[NDArray[np.uint8] | None]]) -> tuple[int, int]:
    """(width, height) of every cell, for the largest of the pictures."""
    shapes = [each.shape for row in pictures for each in row if each is not None]
    height = max((shape[0] for shape in shapes), default=_SMALLEST)
    width = max((shape[1] for shape in shapes), default=_SMALLEST)
    factor: float = max(1, math.ceil(_SMALLEST / min(width, height)))
    if factor == 1:
        factor = min(1.0, _LARGEST / max(width, height))
    across = max((len(row) for row in pictures), default=0) * width * factor
    down = len(pictures) * height * factor
    factor *= min(
        1.0,
        _LONGEST / max(across, down, 1),
        math.sqrt(_MOST_PIXELS / max(across * down, 1)),
    )
    return max(1, int(width * factor)), max(1, int(height * factor))


# --- words --------------------------------------------------------------------------------------


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)  # Aileron, inside Pillow


class _Label:
    """Folded lines of text, the first paragraph larger.

    lines  at most so many; the last then ends in "…"
    """

    def __init__(self, text: str, width: int, lines: int, head: int = _HEAD) -> None:
        folded: list[tuple[str, int]] = []
        for number, paragraph in enumerate(_clean(text).split("\n") if text else []):
            size = _TEXT if number else head
            folded += [(line, size) for line in _folded(paragraph, width, size)]
        if len(folded) > lines:
            last, size = folded[lines - 1]
            folded = [*folded[: lines - 1], (_cut(last, width, size), size)]
        self._lines = folded
        self.height = sum(size + 5 for _, size in folded)

    def draw(self, pen: ImageDraw, x: int, y: int) -> None:
        """Set the lines from (x, y) down."""
        for number, (line, size) in enumerate(self._lines):
            is_head = number == 0 or size != _TEXT
            pen.text((x, y), line, fill=_INK if is_head else _SOFT, font=_font(size))
            y += size + 5


def _clean(text: str) -> str:
    """Text whose letters can be set; control characters are left out."""
    return "".join(char if char == "\n" or char.isprintable() else " " for char in text)


def _folded(text: str, width: int, size: int) -> list[str]:
    """Lines no wider than `width` pixels; a word too long for a line is broken."""
    font = _font(size)
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for char in word:
            if lines[-1] and font.getlength(lines[-1] + char) > width:
                lines.append("")
            lines[-1] += char
    return lines


def _cut(text: str, width: int, size: int) -> str:
    while text and _font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
