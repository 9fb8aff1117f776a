"""The page of a rendering: one file that loads nothing, for any browser.

Turns plain data and pixels into HTML; knows nothing of models.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TEMPLATE = Path(__file__).with_name("page.html")
_LOSSLESS_BELOW = 256 * 256  # pixels; larger pictures are embedded as JPEG
_QUALITY = 92


def html_page(data: Mapping[str, Any]) -> str:
    """The page of columns (models) and rows (prompt and seed) with cells.

    A cell's `pixels`, (height, width, 3) uint8, become part of the page. Names, prompts and
    reasons reach it as data only, never as markup.
    """
    text = json.dumps(data, allow_nan=False, default=_embedded).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)


def _embedded(pixels: NDArray[np.uint8]) -> str:
    """A picture as a data: address."""
    from PIL.Image import fromarray

    buffer = io.BytesIO()
    small = pixels.shape[0] * pixels.shape[1] <= _LOSSLESS_BELOW
    image = fromarray(np.ascontiguousarray(pixels))
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
