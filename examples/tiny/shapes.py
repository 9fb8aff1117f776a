"""The training pictures of the tiny family: coloured shapes, drawn by code.

Knows nothing of models. A picture is 64x64 RGB; its caption never names the style, because the
style is what a fine-tune puts into the weights.
"""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64
OVERSAMPLE = 4  # drawn at 256x256, then averaged down: this is the antialiasing
SHAPES = ("circle", "star", "square", "ring", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 32, 40),
    "orange": (255, 138, 20),
    "yellow": (250, 222, 40),
    "green": (36, 190, 70),
    "blue": (44, 92, 255),
    "purple": (150, 62, 214),
    "pink": (255, 130, 196),
    "white": (250, 250, 250),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "navy": (14, 18, 84),
    "black": (8, 8, 10),
    "grey": (112, 112, 112),
    "brown": (92, 50, 24),
}
STYLES = ("flat", "outlined", "pastel", "striped", "glow")

STROKE_PX = 4.5  # over half a latent cell (8 px), so that the 8x8 latents carry the outlines
PASTEL_WHITE = 0.55  # share of white mixed into every pastel colour
STRIPE_PERIOD_PX = 11.0
STRIPE_GAP = 0.35  # cover between the stripes: the shape stays readable
GLOW_SIGMA_PX = 5.0
Point = tuple[float, float]


@dataclass(frozen=True)
class Subject:
    """What a picture shows: the words of its caption."""

    shape: str
    colour: str
    background: str

    @property
    def caption(self) -> str:
        """The full caption, such as 'a red circle on a navy background'."""
        return f"{self.short_caption} on a {self.background} background"

    @property
    def short_caption(self) -> str:
        """The caption without its background, such as 'a red circle'."""
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.shape}"


SUBJECTS = tuple(Subject(*words) for words in product(SHAPES, COLOURS, BACKGROUNDS))


def draw_picture(rng: np.random.Generator, subject: Subject, style: str) -> NDArray[np.uint8]:
    """One picture of `subject` at a random place, size and angle, uint8 (64, 64, 3)."""
    loops = _place(rng, subject.shape)
    cover = _stroke(loops) if style == "outlined" else _fill(loops)  # (64, 64), 0..1
    ink = np.array(COLOURS[subject.colour], dtype=np.float64)
    paper = np.array(BACKGROUNDS[subject.background], dtype=np.float64)
    if style == "pastel":
        ink = ink + (255 - ink) * PASTEL_WHITE
        paper = paper + (255 - paper) * PASTEL_WHITE
    elif style == "striped":
        cover = cover * (STRIPE_GAP + (1 - STRIPE_GAP) * _stripes())
    elif style == "glow":
        cover = np.maximum(cover, 0.85 * _halo(cover))
    picture = paper + (ink - paper) * cover[..., None]  # (64, 64, 3)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def draw_mask(rng: np.random.Generator, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """One inpainting mask, float32 (64, 64): 1 inside a box, 0 outside.

    Three in four boxes hide the whole shape of `picture`, the others lie anywhere. Edges are on
    the 8 px grid of the latents, because the mask reaches the UNet at 8x8.
    """
    if rng.random() < 0.75:
        drawn = np.abs(picture.astype(np.int16) - picture[0, 0]).max(axis=2) > 20
        rows, columns = np.nonzero(drawn.any(axis=1))[0], np.nonzero(drawn.any(axis=0))[0]
        grow = rng.integers(0, 2, size=4)
        top, left = max(rows[0] // 8 - grow[0], 0), max(columns[0] // 8 - grow[1], 0)
        bottom, right = rows[-1] // 8 + 1 + grow[2], columns[-1] // 8 + 1 + grow[3]
    else:
        height, width = rng.integers(3, 8, size=2)
        top, left = rng.integers(0, 9 - height), rng.integers(0, 9 - width)
        bottom, right = top + height, left + width
    mask = np.zeros((8, 8), dtype=np.float32)
    mask[top:bottom, left:right] = 1
    return np.kron(mask, np.ones((8, 8), dtype=np.float32))


def hide(picture: NDArray[np.uint8], mask: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The picture with its masked pixels grey: 0 in the -1..1 range the autoencoder reads."""
    return np.where(mask[..., None] > 0, np.uint8(127), picture)


def find_edges(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """White edges on black, uint8 (64, 64, 3), about 2 px wide: what the ControlNet reads.

    An edge is where the gradient of any colour channel (Sobel's, after Gonzalez and Woods, Digital
    Image Processing, section 10.2) is over half of the picture's steepest; no edges in a plain one.
    """
    values = np.pad(picture.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = values[:-2] + 2 * values[1:-1] + values[2:]  # (64, 66, 3)
    down = values[:, :-2] + 2 * values[:, 1:-1] + values[:, 2:]  # (66, 64, 3)
    slope = np.hypot(across[:, 2:] - across[:, :-2], down[2:] - down[:-2]).max(axis=2)
    edges = (slope > 0.5 * slope.max()) * np.uint8(255)  # (64, 64)
    return np.repeat(edges[..., None], 3, axis=2)


def _place(rng: np.random.Generator, shape: str) -> list[list[Point]]:
    """The closed outlines of a shape, in pixels of the 64x64 picture."""
    low, high = (18.0, 23.0) if shape in ("ring", "cross") else (16.0, 23.0)
    radius = rng.uniform(low, high)
    room = radius + 4
    x, y = rng.uniform(room, SIZE - room, size=2)
    turn = math.radians(rng.uniform(-12, 12))
    loops = _unit_loops(shape)
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    return [[(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in p] for p in loops]


def _unit_loops(shape: str) -> list[list[Point]]:
    """The closed outlines of a shape of radius 1 around the origin, y pointing down."""
    if shape == "circle":
        return [_polygon(72)]
    if shape == "ring":
        return [_polygon(72), _polygon(72, 0.48)]
    if shape == "triangle":
        return [[(x, y + 0.2) for x, y in _polygon(3, 1.1)]]
    if shape == "square":
        return [[(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]]
    if shape == "star":
        outer, inner = _polygon(5, 1.08), _polygon(5, 0.5, 0.5)
        return [[point for pair in zip(outer, inner, strict=True) for point in pair]]
    arm, end = 0.34, 1.0
    corner = [(-arm, -end), (arm, -end), (arm, -arm)]
    cross: list[Point] = []
    for _ in range(4):
        cross += corner
        corner = [(-y, x) for x, y in corner]
    return [[p for i, p in enumerate(cross) if p != cross[i - 1]]]


def _polygon(corners: int, radius: float = 1.0, offset: float = 0.0) -> list[Point]:
    """A regular polygon whose first corner points up, turned by `offset` corners."""
    angles = [2 * math.pi * (i + offset) / corners - math.pi / 2 for i in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _scaled(loop: list[Point]) -> list[Point]:
    return [(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in loop]


def _fill(loops: list[list[Point]]) -> NDArray[np.float64]:
    """Coverage of the first outline less the later ones, (64, 64), 0..1."""
    image = Image.new("L", (SIZE * OVERSAMPLE, SIZE * OVERSAMPLE))
    pen = ImageDraw.Draw(image)
    for i, loop in enumerate(loops):
        pen.polygon(_scaled(loop), fill=0 if i else 255)
    return _shrink(image)


def _stroke(loops: list[list[Point]]) -> NDArray[np.float64]:
    """Coverage of a thick line along every outline, (64, 64), 0..1."""
    image = Image.new("L", (SIZE * OVERSAMPLE, SIZE * OVERSAMPLE))
    pen = ImageDraw.Draw(image)
    for loop in loops:
        path = _scaled([*loop, *loop[:2]])
        pen.line(path, fill=255, width=round(STROKE_PX * OVERSAMPLE), joint="curve")
    return _shrink(image)


def _shrink(image: Image.Image) -> NDArray[np.float64]:
    small = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def _stripes() -> NDArray[np.float64]:
    """Diagonal stripes fixed to the picture, (64, 64), 0..1, with soft edges."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    wave = np.sin((x + y) / math.sqrt(2) * 2 * math.pi / STRIPE_PERIOD_PX)
    stripes: NDArray[np.float64] = np.clip(0.5 + 2 * wave, 0, 1)
    return stripes


def _halo(cover: NDArray[np.float64]) -> NDArray[np.float64]:
    """The shape's coverage, blurred: a soft light around it, (64, 64), 0..1."""
    image = Image.fromarray((cover * 255).astype(np.uint8))
    blurred = image.filter(ImageFilter.GaussianBlur(GLOW_SIGMA_PX))
    return np.clip(np.asarray(blurred, dtype=np.float64) / 255 * 1.3, 0, 1)
