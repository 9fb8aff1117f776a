"""The tiny ControlNet on other bases, as it is and transferred: a picture, and how near it draws.

Merges with ckptools (recipes/transfer-control.yaml), draws with samples.py.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file
from samples import (
    CONTROL_PROMPTS,
    Edges,
    Member,
    build,
    build_control,
    find_cover,
    find_silhouette,
    read,
    render,
    save,
    tile,
    with_header,
)
from shapes import SIZE, SUBJECTS, draw_picture, find_edges

from ckptools.recipe import parse_recipe
from ckptools.workflow import merge

RECIPE = Path(__file__).parents[2] / "recipes" / "transfer-control.yaml"
PICTURE = "control-transfer.png"
FIRST_SEED = 5000


def transfer(new_base: str) -> ControlNetModel:
    """The tiny ControlNet for another base: the shipped recipe, with that base in A's place."""
    text = RECIPE.read_text(encoding="utf-8").replace("A.safetensors", f"{new_base}.safetensors")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "control.safetensors"
        output = f"../out/control-for-{new_base}.safetensors"
        merge(parse_recipe(text.replace(output, str(path)), RECIPE))
        return build_control({name: value.float() for name, value in load_file(path).items()})


def measure(member: Member, control: ControlNetModel, form: str, subjects: int) -> list[float]:
    """How much each picture's shape overlaps the one its edges were taken from (IoU).

    form  the style that the member draws; outlines are compared by their silhouettes
    """
    find = find_silhouette if form == "outlined" else find_cover
    found: list[float] = []
    step = len(SUBJECTS) // subjects
    numbered = list(enumerate(SUBJECTS))[::step]
    for start in range(0, len(numbered), 64):
        part = numbered[start : start + 64]
        flat, wanted = (
            [draw_picture(np.random.default_rng(FIRST_SEED + i), s, style) for i, s in part]
            for style in ("flat", form)
        )
        edges = Edges(control, np.stack([find_edges(picture) for picture in flat]))
        drawn = render(member, [(s.caption, FIRST_SEED + i) for i, s in part], edges=edges)
        for picture, aim in zip(drawn, wanted, strict=True):
            seen, true = find(picture), find(aim)
            found.append(float((seen & true).sum() / (seen | true).sum()))
    return found


def draw(members: dict[str, Member], controls: dict[str, ControlNetModel]) -> None:
    """Edges; C with its ControlNet; A and B with it as it is, and transferred to them."""
    rng = np.random.default_rng(8)
    hints = [find_edges(draw_picture(rng, subject, "flat")) for subject, _ in CONTROL_PROMPTS]
    prompts = [(caption, 40 + i) for i, (_, caption) in enumerate(CONTROL_PROMPTS)]
    rows = [("edges", np.stack(hints))]
    for label, name, control in (
        ("C + control", "C", "C"),
        ("A + control", "A", "C"),
        ("A + control\ntransferred", "A", "A"),
        ("B + control", "B", "C"),
        ("B + control\ntransferred", "B", "B"),
    ):
        edges = Edges(controls[control], np.stack(hints))
        rows.append((label, render(members[name], prompts, edges=edges)))
    words = (caption.removesuffix(" background").split(" on a ") for caption, _ in prompts)
    labels = [f"{shape.split(' ', 1)[1]}\non {ground}" for shape, ground in words]
    save(with_header(tile(rows, label_width=110), labels, 110, SIZE * 2 + 4), PICTURE)


def main() -> None:
    """Draw the picture, or print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=["picture", "score"])
    parser.add_argument("--subjects", type=int, default=len(SUBJECTS), help="of 192, for score")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    members = {name: build(read(f"{name}.safetensors")) for name in "ABC"}
    old = build_control(read("control.safetensors"))
    controls = {"C": old, "A": transfer("A"), "B": transfer("B")}
    if "picture" in args.what:
        draw(members, controls)
    if "score" in args.what:
        for name, form in (("A", "flat"), ("B", "outlined")):
            for label, control in (("as it is", old), ("transferred", controls[name])):
                near = measure(members[name], control, form, args.subjects)
                share = np.mean(np.array(near) >= 0.6)
                print(f"{name}, {label}: {share:.0%} there, mean IoU {np.mean(near):.3f}")


if __name__ == "__main__":
    main()
