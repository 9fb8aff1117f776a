"""Render the packed tiny family from its single files: the pictures of the docs, and a score.

Reads only ckptools/tiny, through diffusers and transformers, and merges with plain torch: an
independent check of the files and of ckptools' own merges.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from convert import CONTROL, UNET, control_name, from_single_file, unet_name
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from networks import tokenize
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors.torch import load_file
from shapes import (
    BACKGROUNDS,
    COLOURS,
    PASTEL_WHITE,
    SHAPES,
    SIZE,
    STRIPE_PERIOD_PX,
    SUBJECTS,
    Subject,
    draw_picture,
    find_edges,
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
CONTROL_PROMPTS = (  # whose edges, and the caption: the last two name another shape
    (Subject("star", "yellow", "black"), "a yellow star on a black background"),
    (Subject("cross", "red", "black"), "a red cross on a navy background"),
    (Subject("ring", "white", "black"), "a white ring on a brown background"),
    (Subject("triangle", "green", "black"), "a green triangle on a black background"),
    (Subject("square", "purple", "black"), "a purple square on a brown background"),
    (Subject("circle", "orange", "black"), "an orange circle on a grey background"),
    (Subject("star", "blue", "black"), "a blue circle on a black background"),
    (Subject("triangle", "pink", "black"), "a pink ring on a navy background"),
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


@dataclass(frozen=True)
class Edges:
    """What a ControlNet draws after: edge pictures (n, 64, 64, 3), and how much they weigh."""

    control: ControlNetModel
    pictures: Picture
    weight: float = 1.0


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


def build_control(tensors: Checkpoint) -> ControlNetModel:
    """The model of a ControlNet's file: the sizes are those of the UNet it was copied from."""
    sizes = UNet2DConditionModel.load_config(TINY / "config" / "unet")
    control = ControlNetModel.from_unet(UNet2DConditionModel.from_config(sizes))
    names = {name: CONTROL + control_name(name) for name in control.state_dict()}
    control.load_state_dict({name: tensors[names[name]] for name in names}, strict=True)
    return control.eval().requires_grad_(False)


def bake(tensors: Checkpoint, lora: Checkpoint, weight: float) -> Checkpoint:
    """W + weight * (alpha / rank) * up @ down, cast as `add_difference` does; see loras.py.

    `lora` has PEFT's names, or kohya's, which are built from the UNet's and looked up.
    """
    sizes = UNet2DConditionModel.load_config(TINY / "config" / "unet")
    made, used = dict(tensors), 0
    for module, layer in UNet2DConditionModel.from_config(sizes).named_modules():
        peft, kohya = f"unet.{module}", "lora_unet_" + module.replace(".", "_")
        if f"{peft}.lora_A.weight" in lora:
            down, up = lora[f"{peft}.lora_A.weight"], lora[f"{peft}.lora_B.weight"]
            scale, used = 1.0, used + 2  # loras.py trains with alpha = rank
        elif f"{kohya}.alpha" in lora:
            down, up = lora[f"{kohya}.lora_down.weight"], lora[f"{kohya}.lora_up.weight"]
            scale, used = float(lora[f"{kohya}.alpha"]) / len(down), used + 3
        else:
            continue
        name = UNET + unet_name(f"{module}.weight")
        change = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
        made[name] = (tensors[name] + weight * scale * change).half().float()
    if used != len(lora):
        message = f"{len(lora) - used} of {len(lora)} tensors have no place in the UNet"
        raise ValueError(message)
    return made


@torch.no_grad()
def render(
    member: Member,
    prompts: list[tuple[str, int]],
    hole: Hole | None = None,
    edges: Edges | None = None,
) -> Picture:
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
    if edges is not None:
        hint = torch.from_numpy(edges.pictures).permute(0, 3, 1, 2).float() / 255
        hint = hint.repeat(2, 1, 1, 1)
    scheduler = member.scheduler
    scheduler.set_timesteps(STEPS)
    down, middle = None, None
    for moment in scheduler.timesteps:
        seen = torch.cat([x, extra], dim=1).repeat(2, 1, 1, 1)
        if edges is not None:
            down, middle = edges.control(
                seen, moment, states, hint, edges.weight, return_dict=False
            )
        without, with_ = member.unet(
            seen,
            moment,
            states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample.chunk(2)
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
            # repeated pixels keep a large sheet small; a larger zoom would show them
            how = Image.Resampling.NEAREST if zoom == 2 else Image.Resampling.BICUBIC
            big = Image.fromarray(picture).resize((side, side), how)
            sheet.paste(big, (label_width + j * (side + gap), top))
    return sheet


def with_header(sheet: Image.Image, labels: list[str], first: int, step: int) -> Image.Image:
    """The sheet under a row of column labels."""
    font = ImageFont.load_default(size=17)
    height = 12 + 22 * max(label.count("\n") + 1 for label in labels)
    tall = Image.new("RGB", (sheet.width, sheet.height + height), "white")
    tall.paste(sheet, (0, height))
    for i, label in enumerate(labels):
        place = (first + i * step + step // 2, height // 2)
        pen = ImageDraw.Draw(tall)
        pen.multiline_text(place, label, fill="black", font=font, anchor="mm", align="center")
    return tall


def save(image: Image.Image, name: str) -> None:
    """Write one picture of the docs."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    image.save(IMAGES / name, optimize=True)


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


def draw_loras(files: dict[str, Checkpoint]) -> None:
    """The shipped LoRAs baked into C, and one of them into A: loras.png."""
    striped, glow = read("striped.safetensors"), read("glow.safetensors")
    sources = {
        "C": files["C"],
        "C + striped": bake(files["C"], striped, 1.0),
        "C + glow": bake(files["C"], glow, 1.0),
        "A + glow": bake(files["A"], glow, 1.0),
    }
    prompts = list(PROMPTS[:6])
    rows = [(label, render(build(tensors), prompts)) for label, tensors in sources.items()]
    save(tile(rows, label_width=110), "loras.png")


def draw_control(files: dict[str, Checkpoint]) -> None:
    """Edge pictures, and what C, A and B draw after them: tiny-control.png."""
    rng = np.random.default_rng(8)
    control = build_control(read("control.safetensors"))
    hints = [find_edges(draw_picture(rng, subject, "flat")) for subject, _ in CONTROL_PROMPTS]
    edges = Edges(control, np.stack(hints))
    prompts = [(caption, 40 + i) for i, (_, caption) in enumerate(CONTROL_PROMPTS)]
    rows = [("edges", edges.pictures), ("C", render(build(files["C"]), prompts))]
    for name in ("C", "A", "B"):
        rows.append((f"{name} + control", render(build(files[name]), prompts, edges=edges)))
    sheet = tile(rows, label_width=110)
    words = (caption.removesuffix(" background").split(" on a ") for caption, _ in prompts)
    labels = [f"{shape.split(' ', 1)[1]}\non {ground}" for shape, ground in words]
    save(with_header(sheet, labels, 110, SIZE * 2 + 4), "tiny-control.png")


# Score --------------------------------------------------------------------------------------------


def guess_subject(picture: Picture, *, form: str, colours: str) -> Subject:
    """What a picture shows, by nearest colours and by overlap with drawn shapes."""
    white = PASTEL_WHITE if colours == "pastel" else 0.0
    flat, paper, distance = _against_paper(picture)
    ink = np.median(flat[distance > 0.8 * np.quantile(distance, 0.98)], axis=0)
    colour = _nearest(ink, COLOURS, white)
    background = _nearest(paper, BACKGROUNDS, white)
    seen = _cropped(find_cover(picture))
    overlaps = {
        shape: max((seen & t).sum() / (seen | t).sum() for t in _templates(shape, form))
        for shape in SHAPES
    }
    return Subject(max(overlaps, key=lambda shape: overlaps[shape]), colour, background)


def find_cover(picture: Picture) -> NDArray[np.bool_]:
    """The pixels of a picture's shape, (64, 64): what differs enough from its corners."""
    distance = _against_paper(picture)[2]
    return distance > 0.5 * np.quantile(distance, 0.98)


def find_silhouette(picture: Picture) -> NDArray[np.bool_]:
    """The pixels of a picture's shape and of what it encloses, (64, 64): outlines count whole."""
    cover = np.pad(find_cover(picture), 1).astype(np.uint8)
    image = Image.fromarray(cover * 255).copy()  # fromarray's pixels may be read-only
    ImageDraw.floodfill(image, (0, 0), 128)
    return np.asarray(image)[1:-1, 1:-1] != 128


def _against_paper(
    picture: Picture,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The picture in F64, the colour of its corners (3,), each pixel's distance to it (64, 64)."""
    flat = picture.astype(np.float64)
    paper = np.median(flat[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
    return flat, paper, np.linalg.norm(flat - paper, axis=2)


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


def score_control(label: str, tensors: Checkpoint, form: str, *, others: bool = False) -> str:
    """One line: how often a shape is drawn where the edges say, with the ControlNet and without.

    An IoU of 0.6 with the picture the edges were taken from (in the member's own style, `form`)
    counts as drawn there; outlined shapes are compared by their silhouettes. One picture per
    caption, edges never seen in training; with `others`, each caption names the next shape
    instead of the one of the edges.
    """
    find = find_silhouette if form == "outlined" else find_cover
    member, control = build(tensors), build_control(read("control.safetensors"))
    found: dict[bool, list[float]] = {True: [], False: []}
    per_shape = len(SUBJECTS) // len(SHAPES)
    for start in range(0, len(SUBJECTS), 64):
        part = SUBJECTS[start : start + 64]
        seeds = range(5000 + start, 5000 + start + len(part))
        flat, wanted = (
            [
                draw_picture(np.random.default_rng(seed), subject, style)
                for seed, subject in zip(seeds, part, strict=True)
            ]
            for style in ("flat", form)
        )
        edges = Edges(control, np.stack([find_edges(picture) for picture in flat]))
        shift = per_shape if others else 0
        named = [SUBJECTS[(start + i + shift) % len(SUBJECTS)].caption for i in range(len(part))]
        prompts = list(zip(named, seeds, strict=True))
        for with_control, overlaps in found.items():
            drawn = render(member, prompts, edges=edges if with_control else None)
            for picture, aim in zip(drawn, wanted, strict=True):
                seen, true = find(picture), find(aim)
                overlaps.append(float((seen & true).sum() / (seen | true).sum()))
    shares = {on: np.mean(np.array(overlaps) >= 0.6) for on, overlaps in found.items()}
    means = {on: np.mean(overlaps) for on, overlaps in found.items()}
    return (
        f"{label}: {shares[True]:.0%} drawn where the edges are (mean IoU {means[True]:.2f}), "
        f"without the ControlNet {shares[False]:.0%} ({means[False]:.2f})"
    )


def measure_styles(pictures: Picture) -> tuple[float, float]:
    """How strong stripes and glow are in pictures (n, 64, 64, 3), as shares of the ink, 0 for none.

    stripes  the wave of the stripes' direction and period in the shape, at any phase
    glow     how much ink there is 3 to 6 px outside of the shape
    """
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    wave = np.exp(2j * np.pi * (x + y) / np.sqrt(2) / STRIPE_PERIOD_PX)
    stripes, glow = [], []
    for picture in pictures:
        distance = _against_paper(picture)[2]
        ink = distance / np.quantile(distance, 0.98)
        shape = ink > 0.2
        stripes.append(2 * abs(((ink[shape] - ink[shape].mean()) * wave[shape]).mean()))
        near, far = (
            np.asarray(Image.fromarray(ink > 0.6).convert("L").filter(ImageFilter.MaxFilter(size)))
            for size in (5, 13)
        )
        glow.append(ink[(far > 0) & (near == 0)].mean())
    return float(np.mean(stripes)), float(np.mean(glow))


def score_styles(label: str, tensors: Checkpoint) -> str:
    """One line: how strong the LoRAs' styles are in 48 pictures of a checkpoint."""
    prompts = [(subject.caption, 3000 + i) for i, subject in enumerate(SUBJECTS[::4])]
    stripes, glow = measure_styles(render(build(tensors), prompts))
    return f"{label}: stripes {stripes:.2f}, glow {glow:.2f}"


def score_members(files: dict[str, Checkpoint]) -> None:
    """Print the scores of the members and of one merge."""
    merged = add_difference(files["A"], files["B"], files["C"], 1.0)
    for label, tensors, form, colours in (
        ("C", files["C"], "flat", "flat"),
        ("U", files["U"], "flat", "flat"),
        ("B", files["B"], "outlined", "flat"),
        ("A", files["A"], "flat", "pastel"),
        ("A + (B - C)", merged, "outlined", "pastel"),
    ):
        print(score(label, tensors, form, colours), flush=True)


def score_adapters(files: dict[str, Checkpoint]) -> None:
    """Print the scores of the ControlNet on three members, and of C with each LoRA."""
    for name, form in (("C", "flat"), ("A", "pastel"), ("B", "outlined")):
        print(score_control(name, files[name], form), flush=True)
    print(score_control("C, another shape named", files["C"], "flat", others=True), flush=True)
    for style in ("flat", "striped", "glow"):
        rng = np.random.default_rng(9)
        drawn = np.stack([draw_picture(rng, subject, style) for subject in SUBJECTS[::4]])
        stripes, glow = measure_styles(drawn)
        print(f"drawn {style}: stripes {stripes:.2f}, glow {glow:.2f}", flush=True)
    print(score_styles("C", files["C"]), flush=True)
    for name in ("striped", "glow"):
        for weight in (0.5, 1.0):
            baked = bake(files["C"], read(f"{name}.safetensors"), weight)
            print(score(f"C + {name} * {weight}", baked, "flat", "flat"), flush=True)
            print(score_styles(f"C + {name} * {weight}", baked), flush=True)


PICTURES = {
    "family": draw_family,
    "merge": draw_merge,
    "inpaint": draw_inpaint,
    "loras": draw_loras,
    "control": draw_control,
}
SCORES = {"score": score_members, "score-adapters": score_adapters}


def main() -> None:
    """Draw the pictures, or print the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = ["pictures", *PICTURES, *SCORES]
    parser.add_argument("what", nargs="+", choices=known, help="pictures: all five of them")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    files = {name: read(f"{name}.safetensors") for name in "ABCIU"}
    for what in args.what:
        for name in PICTURES if what == "pictures" else (what,):
            (PICTURES | SCORES)[name](files)


if __name__ == "__main__":
    main()
