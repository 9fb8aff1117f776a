"""Render the packed tiny family from its single files: the pictures of the docs, and a score.

Reads only ckptools/tiny, through diffusers and transformers, and merges with plain torch: an
independent check of the files and of ckptools' own merges.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from convert import UNET, from_single_file
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from models import tokenize
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from shapes import (
    BACKGROUNDS,
    COLOURS,
    PASTEL_WHITE,
    SHAPES,
    SIZE,
    SUBJECTS,
    Subject,
    draw_picture,
    hide,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TINY = Path(__file__).parents[2] / "ckptools" / "tiny"
IMAGES = Path(__file__).parents[2] / "docs" / "images"
STEPS, GUIDANCE = 25, 3.0
CONV_IN = UNET + "input_blocks.0.0.weight"
PROMPTS = (  # captions, and seeds picked by eye among twelve; `score` picks none
    ("a red circle on a black background", 33),
    ("a yellow star on a black background", 35),
    ("a purple square on a brown background", 36),
    ("a white ring on a brown background", 31),
    ("a blue triangle on a black background", 38),
    ("an orange cross on a black background", 33),
    ("a pink star on a navy background", 34),
    ("a green triangle on a navy background", 30),
)
Checkpoint = dict[str, Tensor]
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Member:
    """The models of one checkpoint, ready to draw."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler


@dataclass(frozen=True)
class Hole:
    """What inpainting starts from: pictures (n, 64, 64, 3) and masks (n, 64, 64), 1 = redraw."""

    pictures: Picture
    masks: NDArray[np.float32]


def read(name: str) -> Checkpoint:
    """The tensors of one packed checkpoint, in F32 but for the position numbers."""
    return {k: v.float() if v.is_floating_point() else v for k, v in load_file(TINY / name).items()}


def add_difference(a: Checkpoint, b: Checkpoint, c: Checkpoint, weight: float) -> Checkpoint:
    """A + (B - C) * weight, cast to F16 as a file would be, then to F32 to draw with it.

    A first convolution of 4 channels is widened with zeros to B's 9: the inpainting merge.
    """

    def wide(name: str, value: Tensor) -> Tensor:
        missing = b[name].shape[1] - value.shape[1] if name == CONV_IN else 0
        return torch.nn.functional.pad(value, (0, 0, 0, 0, 0, missing)) if missing else value

    made = {}
    for name, value in a.items():
        is_float = value.is_floating_point()
        change = (b[name] - wide(name, c[name])) * weight if is_float else 0
        made[name] = (wide(name, value) + change).half().float() if is_float else value
    return made


def build(tensors: Checkpoint) -> Member:
    """The models of a checkpoint: sizes from ckptools/tiny/config, every name matched."""
    config = TINY / "config"
    sizes = UNet2DConditionModel.load_config(config / "unet")
    unet = UNet2DConditionModel.from_config({**sizes, "in_channels": tensors[CONV_IN].shape[1]})
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(config / "vae"))
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(config / "text_encoder"))
    models = (unet, vae, text)
    like = dict(zip(("unet", "vae", "text"), (m.state_dict() for m in models), strict=True))
    for model, state in zip(models, from_single_file(tensors, **like), strict=True):
        model.load_state_dict(state, strict=True)
        model.eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(config / "tokenizer")
    return Member(unet, vae, text, tokenizer, DDIMScheduler.from_pretrained(config / "scheduler"))


@torch.no_grad()
def render(member: Member, prompts: list[tuple[str, int]], hole: Hole | None = None) -> Picture:
    """Pictures (n, 64, 64, 3) of (caption, seed) pairs: DDIM, 25 steps, guidance 3, CPU noise."""
    vae, scale = member.vae, member.vae.config.scaling_factor
    captions = [""] * len(prompts) + [caption for caption, _ in prompts]
    states = member.text(tokenize(member.tokenizer, captions)).last_hidden_state
    seeds = [torch.Generator().manual_seed(seed) for _, seed in prompts]
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=seed) for seed in seeds])
    extra = torch.zeros(len(x), 0, 8, 8)
    if hole is not None:
        holed = [hide(*pair) for pair in zip(hole.pictures, hole.masks, strict=True)]
        pixels = torch.from_numpy(np.stack(holed)).permute(0, 3, 1, 2) / 127.5 - 1
        masks = torch.from_numpy(hole.masks[:, None, ::8, ::8])
        extra = torch.cat([masks, vae.encode(pixels).latent_dist.mode() * scale], dim=1)
    scheduler = member.scheduler
    scheduler.set_timesteps(STEPS)
    for moment in scheduler.timesteps:
        seen = torch.cat([x, extra], dim=1).repeat(2, 1, 1, 1)
        without, with_ = member.unet(seen, moment, states).sample.chunk(2)
        x = scheduler.step(without + GUIDANCE * (with_ - without), moment, x).prev_sample
    y = (vae.decode(x / scale).sample / 2 + 0.5).clamp(0, 1)
    return (y * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


# Pictures -----------------------------------------------------------------------------------------


def tile(rows: list[tuple[str, Picture]], *, label_width: int, zoom: int = 2) -> Image.Image:
    """Rows of pictures with their labels at the left, each picture magnified."""
    side, gap = SIZE * zoom, 4
    width = label_width + len(rows[0][1]) * (side + gap)
    sheet = Image.new("RGB", (width, len(rows) * (side + gap) - gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for i, (label, pictures) in enumerate(rows):
        top = i * (side + gap)
        middle = (8, top + side // 2)
        pen.multiline_text(middle, label, fill="black", font=font, anchor="lm", spacing=6)
        for j, picture in enumerate(pictures):
            big = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(big, (label_width + j * (side + gap), top))
    return sheet


def with_header(sheet: Image.Image, labels: list[str], first: int, step: int) -> Image.Image:
    """The sheet under a row of column labels."""
    font = ImageFont.load_default(size=17)
    tall = Image.new("RGB", (sheet.width, sheet.height + 34), "white")
    tall.paste(sheet, (0, 34))
    for i, label in enumerate(labels):
        place = (first + i * step + step // 2, 17)
        ImageDraw.Draw(tall).text(place, label, fill="black", font=font, anchor="mm")
    return tall


def save(image: Image.Image, name: str) -> None:
    """Write one picture of the docs."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    small = image.quantize(256, dither=Image.Dither.NONE)  # a third of the bytes
    small.save(IMAGES / name, optimize=True)


def draw_family(files: dict[str, Checkpoint]) -> None:
    """Every member, and the pastel one with more and more outline: tiny-family.png."""
    a, b, c = files["A"], files["B"], files["C"]
    half = {k: ((c[k] + v) / 2 if v.is_floating_point() else v) for k, v in files["U"].items()}
    sources = {
        "C  flat": c,
        "B  outlined": b,
        "A  pastel": a,
        "A + (B - C) · 0.5": add_difference(a, b, c, 0.5),
        "A + (B - C) · 1": add_difference(a, b, c, 1.0),
        "U  flat,\nother seed": files["U"],
        "(C + U) / 2": half,
    }
    rows = [(label, render(build(tensors), list(PROMPTS))) for label, tensors in sources.items()]
    save(tile(rows, label_width=150), "tiny-family.png")


def draw_merge(files: dict[str, Checkpoint]) -> None:
    """The picture of one merge, source by source: merge.png."""
    a, b, c = files["A"], files["B"], files["C"]
    prompts = [PROMPTS[i] for i in (1, 3, 5)]
    sources = (a, b, c, add_difference(a, b, c, 1.0))
    columns = [render(build(tensors), prompts) for tensors in sources]
    rows = [("", np.stack(pictures)) for pictures in zip(*columns, strict=True)]
    labels = ["A: pastel", "B: outlined", "C: their base", "A + (B - C)"]
    step = SIZE * 3 + 4
    save(with_header(tile(rows, label_width=0, zoom=3), labels, 0, step), "merge.png")


def draw_inpaint(files: dict[str, Checkpoint]) -> None:
    """Shapes redrawn in a hole, by I and by the pastel A + (I - C): tiny-inpaint.png."""
    pastel = add_difference(files["A"], files["I"], files["C"], 1.0)
    examples = (
        ("blue", "circle", "yellow star", "black"),
        ("red", "square", "white ring", "brown"),
        ("orange", "triangle", "blue cross", "grey"),
    )
    rows = []
    for style, tensors, formula in (("flat", files["I"], "I"), ("pastel", pastel, "A + (I - C)")):
        rng = np.random.default_rng(5)
        pictures, masks, prompts = [], [], []
        for i, (colour, shape, new, background) in enumerate(examples):
            mask = np.zeros((SIZE, SIZE), dtype=np.float32)
            mask[8:56, 8:56] = 1
            picture = draw_picture(rng, Subject(shape, colour, background), style)
            while np.ptp(picture[mask == 0], axis=0).any():  # until the hole hides the shape
                picture = draw_picture(rng, Subject(shape, colour, background), style)
            pictures.append(picture)
            masks.append(mask)
            prompts.append((f"a {new} on a {background} background", 20 + i))
        hole = Hole(np.stack(pictures), np.stack(masks))
        drawn = render(build(tensors), prompts, hole)
        for i, (caption, _) in enumerate(prompts):
            white = np.repeat((masks[i][..., None] * 255).astype(np.uint8), 3, axis=2)
            label = f"{formula}\n{caption.split(' on ')[0]}"
            shown = [pictures[i], white, hide(pictures[i], masks[i]), drawn[i]]
            rows.append((label, np.stack(shown)))
    sheet = tile(rows, label_width=140)
    labels = ["input", "mask", "masked", "redrawn"]
    save(with_header(sheet, labels, 140, SIZE * 2 + 4), "tiny-inpaint.png")


# Score --------------------------------------------------------------------------------------------


def guess_subject(picture: Picture, *, form: str, colours: str) -> Subject:
    """What a picture shows, by nearest colours and by overlap with drawn shapes."""
    white = PASTEL_WHITE if colours == "pastel" else 0.0
    flat = picture.astype(np.float64)
    paper = np.median(flat[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
    distance = np.linalg.norm(flat - paper, axis=2)
    cover = distance > 0.5 * np.quantile(distance, 0.98)
    ink = np.median(flat[distance > 0.8 * np.quantile(distance, 0.98)], axis=0)
    colour = _nearest(ink, COLOURS, white)
    background = _nearest(paper, BACKGROUNDS, white)
    seen = _cropped(cover)
    overlaps = {
        shape: max((seen & t).sum() / (seen | t).sum() for t in _templates(shape, form))
        for shape in SHAPES
    }
    return Subject(max(overlaps, key=lambda shape: overlaps[shape]), colour, background)


def _nearest(
    seen: NDArray[np.float64], named: dict[str, tuple[int, int, int]], white: float
) -> str:
    def distance(name: str) -> float:
        drawn = np.array(named[name]) * (1 - white) + 255 * white
        return float(np.linalg.norm(seen - drawn))

    return min(named, key=distance)


def _cropped(cover: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A shape's pixels, scaled to fill 32x32."""
    box = Image.fromarray(cover).getbbox() or (0, 0, SIZE, SIZE)
    crop = Image.fromarray((cover * 255).astype(np.uint8)).resize((32, 32), box=box)
    return np.asarray(crop) > 127


_DRAWN: dict[tuple[str, str], list[NDArray[np.bool_]]] = {}


def _templates(shape: str, style: str) -> list[NDArray[np.bool_]]:
    if (shape, style) not in _DRAWN:
        rng, subject = np.random.default_rng(7), Subject(shape, "white", "black")
        drawn = [draw_picture(rng, subject, style) for _ in range(24)]
        _DRAWN[shape, style] = [_cropped(picture.max(axis=2) > 190) for picture in drawn]
    return _DRAWN[shape, style]


def score(label: str, tensors: Checkpoint, form: str, colours: str) -> str:
    """One line: how often shape, colour and background come out as asked, over 192 captions.

    `form` is the style whose shapes are expected, `colours` the style whose colours are.
    """
    hits = {"shape": 0, "colour": 0, "background": 0, "all": 0}
    member, wanted = build(tensors), list(SUBJECTS)
    by_shape = dict.fromkeys(SHAPES, 0)
    for start in range(0, len(wanted), 64):
        part = wanted[start : start + 64]
        prompts = [(subject.caption, 1000 + start + i) for i, subject in enumerate(part)]
        for subject, picture in zip(part, render(member, prompts), strict=True):
            seen = guess_subject(picture, form=form, colours=colours)
            by_shape[subject.shape] += seen.shape == subject.shape
            hits["shape"] += seen.shape == subject.shape
            hits["colour"] += seen.colour == subject.colour
            hits["background"] += seen.background == subject.background
            hits["all"] += seen == subject
    shares = ", ".join(f"{what} {count / len(wanted):.0%}" for what, count in hits.items())
    shapes = ", ".join(f"{s} {n * 6 / len(wanted):.0%}" for s, n in by_shape.items())
    return f"{label}: {shares} ({shapes})"


def main() -> None:
    """Draw the pictures, or print the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["pictures", "score"])
    args = parser.parse_args()
    torch.set_num_threads(2)
    files = {name: read(f"{name}.safetensors") for name in "ABCIU"}
    if args.what == "pictures":
        draw_family(files)
        draw_merge(files)
        draw_inpaint(files)
    else:
        merged = add_difference(files["A"], files["B"], files["C"], 1.0)
        for label, tensors, form, colours in (
            ("C", files["C"], "flat", "flat"),
            ("U", files["U"], "flat", "flat"),
            ("B", files["B"], "outlined", "flat"),
            ("A", files["A"], "flat", "pastel"),
            ("A + (B - C)", merged, "outlined", "pastel"),
        ):
            print(score(label, tensors, form, colours))


if __name__ == "__main__":
    main()
