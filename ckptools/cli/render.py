"""`ckptools render`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from ckptools.cli.options import SOURCE, ModelCommand, json_option, load, set_option

_FILE = click.Path(path_type=Path)
_INTERRUPTED = 130  # as shells report an end by Ctrl-C


def _size(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:\s*[xX]\s*(\d{1,5}))?", text.strip())
    if found is None:
        raise click.BadParameter(f"{text!r} is not WIDTHxHEIGHT, such as 512x768")
    return int(found[1]), int(found[2] or found[1])


@click.command(name="render", cls=ModelCommand)
@click.argument("sources", nargs=-1, required=True, type=SOURCE, metavar="SRC…")
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="What to draw (repeatable). Default: prompts that suit the model.",
)
@click.option("-n", "--negative", default=None, metavar="TEXT", help="What not to draw.")
@click.option("--probes", is_flag=True, help="Add the built-in prompts to those given.")
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Draw every prompt from this seed (repeatable). Default: 1.",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 1000),
    default=None,
    metavar="N",
    help="Default: 20; 8 for a full-size model without a GPU.",
)
@click.option(
    "--sampler",
    default=None,
    metavar="NAME",
    help="As the web UIs call it: Euler a, DDIM, UniPC … Default: DPM++ 2M Karras.",
)
@click.option(
    "--guidance",
    type=float,
    default=None,
    metavar="CFG",
    help="Classifier-free guidance. Default: what suits the model.",
)
@click.option(
    "--size",
    callback=_size,
    default=None,
    metavar="WxH",
    help="In pixels. Default: the image's, else the model's.",
)
@click.option(
    "--clip-skip",
    type=click.IntRange(1, 24),
    default=None,
    metavar="N",
    help="Read the text encoder N - 1 layers before its end.",
)
@click.option(
    "--image", type=_FILE, default=None, help="Start from this picture; edit or inpaint it."
)
@click.option("--mask", type=_FILE, default=None, help="Redraw where this picture is white.")
@click.option(
    "--strength",
    type=click.FloatRange(0, 1, min_open=True),
    default=None,
    help="How much of the image is drawn anew. Default: 0.75, with a mask 1.",
)
@click.option("--control", type=SOURCE, default=None, help="A ControlNet to draw with.")
@click.option(
    "--condition",
    default=None,
    metavar="KIND|FILE",
    help="Its picture: a file, edges:FILE for the edges of one, or a kind that is drawn: edges, "
    "depth, normal, lines, pose.",
)
@click.option(
    "--config",
    type=_FILE,
    default=None,
    help="A diffusers folder (weights are not needed), for models of unusual width.",
)
@click.option("--vae", type=SOURCE, default=None, help="Draw with this VAE.")
@click.option(
    "--beside",
    multiple=True,
    type=SOURCE,
    metavar="FILE",
    help="Compare with this model (repeatable). A recipe's models are there already.",
)
@click.option(
    "--scores",
    type=_FILE,
    default=None,
    metavar="FOLDER",
    help="Score the pictures by this CLIP model (of transformers), for information.",
)
@click.option("--device", default=None, metavar="NAME", help="auto, cpu, cuda or mps.")
@click.option("--no-cache", is_flag=True, help="Draw the compared models' pictures again.")
@set_option
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    metavar="FOLDER",
    help="Default: NAME-render, named after the first SRC; beside a recipe's output.",
)
@click.option(
    "-f", "--force", is_flag=True,
    help="Draw into a folder that holds more than an earlier rendering.",
)  # fmt: skip
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
def command(
    sources: tuple[Path, ...], prompts: tuple[str, ...], negative: str | None, probes: bool,
    seeds: tuple[int, ...], steps: int | None, sampler: str | None, guidance: float | None,
    size: tuple[int, int] | None, clip_skip: int | None, image: Path | None, mask: Path | None,
    strength: float | None, control: Path | None, condition: str | None,
    config: Path | None, vae: Path | None, beside: tuple[Path, ...], scores: Path | None,
    device: str | None, no_cache: bool, settings: Mapping[str, float],
    output: Path | None, force: bool, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Draw test pictures with models, compare and check them.

    SRC is a model, or a recipe: that is merged in memory and drawn beside its models. Writes the
    pictures, a sheet of all of them and a page to look at. Exits with 1 where a check fails.

    \b
    Examples:
      ckptools render merge.safetensors --beside A.safetensors --beside hf://owner/repo
      ckptools render recipe.yaml --set M=0.5 --seed 1 --seed 2
      ckptools render inpainting.safetensors --image photo.png --mask hole.png -p "a red door"
      ckptools render model.safetensors --control canny.safetensors --condition edges
    """
    from ckptools import report, report_render
    from ckptools.rendering import Order, numbered, render_files

    said: dict[str, Any] = {
        "prompts": numbered(prompts), "probes": probes, "negative": negative, "seeds": seeds,
        "steps": steps, "sampler": sampler, "cfg": guidance, "size": size, "image": image,
        "clip_skip": clip_skip, "mask": mask, "strength": strength, "control": control,
        "condition": condition, "config": config, "vae": vae, "device": device, "scores": scores,
    }  # fmt: skip
    given = {name: value for name, value in said.items() if value not in (None, False, ())}
    quietly = quiet or as_json
    with nullcontext() if quietly else report_render.PictureProgress() as progress:
        if sources[0].suffix in (".yaml", ".yml"):
            from ckptools.workflow import render_recipe

            if len(sources) > 1:
                raise click.UsageError("a recipe is rendered alone; add models with --beside")
            found = render_recipe(
                load(sources[0], settings), given, output, beside=beside,
                use_cache=not no_cache, force=force, progress=progress,
            )  # fmt: skip
        else:
            found = render_files(
                sources, Order(**given), output, beside=beside,
                use_cache=not no_cache, force=force, progress=progress,
            )  # fmt: skip
    if as_json:
        report.show_json("render", report_render.rendering_json(found))
    elif not quiet:
        report_render.show_rendering(found)
    if found.interrupted:
        report.show_message(f"interrupted; {found.kept}")
        return _INTERRUPTED
    return int(found.verdict == "fail")
