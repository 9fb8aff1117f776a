"""What is drawn where nobody says what: prompts that show quickly how a model does.

A model gets the set that its own words can say: Stable Diffusion's, or the shapes of the tiny
family. Inpainting and editing models get a picture to work on, drawn here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ckptools.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckptools.render.loader import Pipeline
    from ckptools.render.prompts import Tokenizer

# A vocabulary that needs more tokens than this for a word spells it out: it does not know it.
_TOKENS_PER_WORD = 2.0


@dataclass(frozen=True)
class Probe:
    """A prompt to draw.

    id        a word for file names and reports
    negative  the negative prompt
    flat      its picture may be of one colour
    """

    id: str
    prompt: str
    negative: str = ""
    flat: bool = False


# Hands are where diffusion models fail first, and these words are what people write against it.
HANDS = "bad hands, bad fingers, extra fingers, missing fingers, deformed"
PHOTOS = (
    Probe("portrait", "portrait photo of an old fisherman, detailed face, soft light",
          "blurry, lowres"),
    Probe("hands", "close up photo of two open hands, palms up, five fingers on each hand", HANDS),
    Probe("text", 'a shop sign that says "OPEN", storefront, street photo', "blurry"),
    Probe("architecture", "a gothic cathedral, symmetrical facade, wide angle photo, clear sky",
          "blurry, tilted"),
    Probe("plain", "a plain solid blue background, flat colour, empty", flat=True),
)  # fmt: skip
SHAPES = (
    Probe("circle", "a red circle on a navy background"),
    Probe("star", "a yellow star on a black background"),
    Probe("square", "an orange square on a black background"),
    Probe("ring", "a white ring on a brown background"),
    Probe("cross", "a purple cross on a navy background"),
)
EDITS = (
    Probe("snow", "make it snow", "blurry"),
    Probe("night", "turn it into night", "blurry"),
    Probe("red", "make the house red", "blurry"),
)
SHAPE_EDITS = (
    Probe("red", "a red circle"),
    Probe("star", "a yellow star"),
)
_SETS = (PHOTOS, SHAPES)
_EDIT_SETS = (EDITS, SHAPE_EDITS)


def probes_for(pipeline: Pipeline) -> tuple[Probe, ...]:
    """The first set of probes whose words the model's tokenizer knows.

    A model that knows the words of none is a `UsageError`.
    """
    sets = _EDIT_SETS if pipeline.blueprint.variant == "ip2p" else _SETS
    tokenizer = pipeline.text_encoders[0].tokenizer
    for probes in sets:
        if _knows(tokenizer, probes):
            return probes
    raise UsageError(
        "no built-in prompt is made of words that this model's tokenizer knows",
        fix="give a prompt",
    )


def usual_guidance(pipeline: Pipeline) -> float:
    """The classifier-free guidance that suits a model: 7, SDXL 6, the tiny family 3."""
    tokenizer = pipeline.text_encoders[0].tokenizer
    if not _knows(tokenizer, PHOTOS) and _knows(tokenizer, SHAPES):
        return 3.0
    return 6.0 if pipeline.blueprint.family == "sdxl" else 7.0


def _knows(tokenizer: Tokenizer, probes: Sequence[Probe]) -> bool:
    return tokens_per_word(tokenizer, [probe.prompt for probe in probes]) <= _TOKENS_PER_WORD


def tokens_per_word(tokenizer: Tokenizer, prompts: Sequence[str]) -> float:
    """How many tokens a word of these prompts takes: near 1 where the vocabulary has them.

    Punctuation counts as a word of its own, as it is a token of its own.
    """
    marks = str.maketrans({mark: f" {mark} " for mark in ',."'})
    words = [word for prompt in prompts for word in prompt.translate(marks).split()]
    return sum(len(tokenizer.ids(prompt)) for prompt in prompts) / len(words)


def drawn_picture(size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture to inpaint or edit: a house on a meadow. (width, height) → (height, width, 3)."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    x, y = (x + 0.5) / width, (y + 0.5) / height
    picture = np.empty((height, width, 3), np.float64)
    picture[:] = (1 - y[..., None]) * (90, 150, 220) + y[..., None] * (200, 225, 245)
    picture[y > 0.7] = (86, 140, 72)
    house = (abs(x - 0.5) < 0.2) & (y > 0.45) & (y < 0.8)
    roof = (y > 0.25) & (y <= 0.45) & (abs(x - 0.5) < (y - 0.25) * 1.25)
    door = (abs(x - 0.5) < 0.05) & (y > 0.6) & (y < 0.8)
    for where, colour in ((house, (226, 214, 190)), (roof, (160, 66, 54)), (door, (92, 62, 44))):
        picture[where] = colour
    sun = (x - 0.82) ** 2 + ((y - 0.18) * height / width) ** 2 < 0.08**2
    picture[sun] = (250, 225, 120)
    return np.asarray(picture.round(), np.uint8)


def drawn_shape(size: tuple[int, int]) -> NDArray[np.uint8]:
    """As `drawn_picture`, in the tiny family's world: a yellow square on navy."""
    picture = np.empty((size[1], size[0], 3), np.uint8)
    picture[:] = (20, 30, 90)
    top, left = size[1] // 4, size[0] // 4
    picture[top : size[1] - top, left : size[0] - left] = (240, 215, 40)
    return picture


def drawn_mask(size: tuple[int, int]) -> NDArray[np.uint8]:
    """A box of half the width and height in the middle: what an inpainting model redraws."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    top, left = size[1] // 4, size[0] // 4
    mask[top : size[1] - top, left : size[0] - left] = 255
    return mask


def picture_for(probes: Sequence[Probe], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture that goes with a set of probes."""
    is_tiny = tuple(probes) in (SHAPES, SHAPE_EDITS)
    return drawn_shape(size) if is_tiny else drawn_picture(size)
