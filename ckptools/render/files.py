"""Pictures as files: read for drawing, written with what they were made with.

Knows Pillow and the web UIs' "parameters" text; draws nothing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptools.errors import InputError, OutputError
from ckptools.render.samplers import SAMPLERS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

_MOST_PIXELS = 8192 * 8192
_SCHEDULES = ("Karras", "Exponential")


def read_picture(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """A picture (height, width, 3); a transparent one on white.

    size  (width, height) to fill: scaled, then cut at the longer side's ends. None: its own, each
          side cut to a multiple of 8
    """
    from PIL import Image, ImageOps

    with _opened(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        with_alpha = upright.convert("RGBA")
        page = Image.new("RGBA", with_alpha.size, "white")
        picture = Image.alpha_composite(page, with_alpha).convert("RGB")
    return _fitted(picture, size, smooth=True)


def read_mask(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A mask (height, width): white, or transparent, is what is redrawn; 0 or 255."""
    from PIL import ImageChops

    with _opened(path) as opened:
        grey = opened.convert("RGBA").convert("L")
        if "A" in opened.getbands():
            alpha = opened.getchannel("A")
            if np.asarray(alpha).min() < 255:  # painted with an eraser, as for DALL·E
                grey = ImageChops.invert(alpha)
    pixels = _fitted(grey, size, smooth=False)
    return np.where(pixels >= 128, np.uint8(255), np.uint8(0))


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) that a picture is drawn at: its own, cut to multiples of 8."""
    height, width, _ = read_picture(path).shape
    return width, height


class _opened:  # noqa: N801  # a context, read as a word
    """An open picture of Pillow; what Pillow cannot read is an `InputError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Image:
        from PIL import Image

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                self._image: Image.Image = Image.open(self._path)
                self._read()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError,
                Image.DecompressionBombWarning) as exc:  # fmt: skip
            what = getattr(exc, "strerror", None) or str(exc).split(":")[0]
            raise InputError(
                f"not a picture that can be read: {what}",
                where=str(self._path),
                fix="give a PNG, JPEG or WebP file",
            ) from exc
        return self._image

    def __exit__(self, *_: object) -> None:
        self._image.close()

    def _read(self) -> None:
        """Read all pixels, or close the file."""
        try:
            if self._image.width * self._image.height > _MOST_PIXELS:
                raise ValueError("too many pixels")
            self._image.load()
        except BaseException:
            self._image.close()
            raise


def _fitted(picture: Image, size: tuple[int, int] | None, *, smooth: bool) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    width, height = picture.size
    wanted = size or (max(8, width // 8 * 8), max(8, height // 8 * 8))
    if picture.size != wanted:
        how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
        picture = ImageOps.fit(picture, wanted, how)
    return np.asarray(picture, np.uint8).copy()


# --- written -------------------------------------------------------------------------------------


def write_picture(pixels: NDArray[np.uint8], path: Path, texts: Mapping[str, str]) -> None:
    """Write a PNG with text chunks, such as {"parameters": infotext(…)}."""
    from PIL.Image import fromarray

    save_image(fromarray(np.ascontiguousarray(pixels)), path, texts)


def save_image(image: Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a picture of Pillow as PNG, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, text in (texts or {}).items():
        chunks.add_text(key, text)
    part = path.with_name(path.name + ".part")
    try:
        image.save(part, "PNG", pnginfo=chunks)
        part.replace(path)
    except BaseException as exc:
        part.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise OutputError(exc.strerror or str(exc), where=str(path)) from exc
        raise


def infotext(
    prompt: str,
    negative: str,
    facts: Mapping[str, Any],
    *,
    model: str,
    model_hash: str = "",
    more: Mapping[str, object] | None = None,
) -> str:
    """What the web UIs write beside a picture and read back from it ("PNG info").

    facts       those of a drawn picture (`Picture.facts`)
    model_hash  sha256 of the model's file; its first ten digits are shown
    more        further pairs

    Source: AUTOMATIC1111 web UI, modules/infotext_utils.py: a last line of `key: value` pairs,
    values with a comma, a colon or a line break in JSON's quotes.
    """
    sampler = str(facts["sampler"])
    schedule = next(
        (s for s in _SCHEDULES if sampler.endswith(f" {s}") and sampler in SAMPLERS), ""
    )
    width, height = facts["size"]
    pairs: dict[str, object] = {
        "Steps": facts["steps"],
        "Sampler": sampler.removesuffix(f" {schedule}"),
        "Schedule type": schedule,
        "CFG scale": f"{facts['cfg']:g}",
        "Seed": facts["seed"],
        "Size": f"{width}x{height}",
        "Model hash": model_hash[:10],
        "Model": model,
        "Clip skip": facts["clip_skip"] if facts["clip_skip"] > 1 else "",
        "Denoising strength": facts.get("strength") or "",
        "RNG": "CPU",
        **(more or {}),
    }
    last = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value != "")
    lines = [_one_line(prompt), last]
    if negative:
        lines.insert(1, f"Negative prompt: {_one_line(negative)}")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split("\n"))


def _quoted(value: object) -> str:
    text = str(value)
    is_plain = not any(mark in text for mark in (",", ":", "\n"))
    return text if is_plain else json.dumps(text, ensure_ascii=False)
