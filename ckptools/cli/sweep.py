"""`ckptools sweep`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ckptools.cli.options import json_option, recipe_argument

_CANCELLED = 130


def _axes(
    _: click.Context, __: click.Parameter, texts: tuple[str, ...]
) -> dict[str, tuple[float, ...]]:
    from ckptools.recipe import parse_values

    axes: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r} is not NAME=VALUES, such as M=0:1:0.25")
        axes[name] = parse_values(values, f"--set {name}")
    return axes


def _size(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _x, height = text.lower().partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise click.BadParameter(f"{text!r} is not WIDTHxHEIGHT, such as 512x512")
    return int(width), int(height)


@click.command(name="sweep")
@recipe_argument
@click.option(
    "--set", "axes", multiple=True, metavar="NAME=VALUES", callback=_axes,
    help="Numbers to try: first:last:step, or a list such as 0,0.5,1 (repeatable: every "
    "combination). Default: the recipe's `sweep:`.",
)  # fmt: skip
@click.option("--prompt", "prompts", multiple=True, help="Draw this (repeatable).")
@click.option("--negative", default=None, help="The negative prompt.")
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(0), help="Draw every prompt "
              "with this seed (repeatable). Default: 1 and 2.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1, 1000), default=None, help="Default: 20.")
@click.option("--sampler", default=None, help="Default: DPM++ 2M Karras.")
@click.option("--guidance", type=float, default=None, help="Default: what suits the model.")
@click.option("--size", metavar="WxH", default=None, callback=_size,
              help="Of the pictures, in pixels. Default: the model's.")  # fmt: skip
@click.option("--scores", metavar="FOLDER", default=None, type=click.Path(path_type=Path),
              help="Score the pictures by this CLIP model (of transformers), for information.",
)  # fmt: skip
@click.option("--device", default=None, help="auto (the default), cpu, cuda, mps.")
@click.option("--save-best", default="", metavar="MEASURE",
              help="Merge the best variant to the recipe's output: loss, loss:B, near:B, far:C, "
              "between:A:B.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=None,
              metavar="FOLDER",
              help="For pictures and report. Default: beside the recipe's output.")  # fmt: skip
@click.option("-f", "--force", is_flag=True, help="Write into a folder that holds more than an "
              "earlier sweep; replace an existing output.")  # fmt: skip
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Warnings and errors only.")
def command(
    recipe: Path, axes: dict[str, tuple[float, ...]], prompts: tuple[str, ...],
    negative: str | None,
    seeds: tuple[int, ...], steps: int | None, sampler: str | None, guidance: float | None,
    size: tuple[int, int] | None, scores: Path | None, device: str | None, save_best: str,
    output: Path | None, force: bool, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Draw a merge at several values of its parameters, and measure how near to each model it is.

    What is drawn is up to the options, then the recipe's `render:`, then the model. Variants are
    merged in memory and drawn at the same seeds as the recipe's models. The folder
    gets a contact sheet, a curve and a page to look at in a browser; no model is written.

    \b
    Examples:
      ckptools sweep recipe.yaml --set M=0:1:0.25
      ckptools sweep recipe.yaml --set M=0,0.5,1 --set N=0,1 --prompt "a red circle" --seed 7
      ckptools sweep recipe.yaml --set M=0:1:0.1 --save-best between:A:B
    """
    from ckptools import report, report_sweep
    from ckptools.cli.options import load
    from ckptools.sweep import draws_of, sweep

    loaded = load(recipe, {})
    folder = output or loaded.output_path.with_name(loaded.output_path.stem + "-sweep")
    given: dict[str, Any] = {
        "prompts": prompts or None, "negative": negative, "seeds": seeds or None, "steps": steps,
        "sampler": sampler, "guidance": guidance, "size": size, "device": device,
        "scores": scores,
    }  # fmt: skip
    draws = replace(draws_of(loaded), **{k: v for k, v in given.items() if v is not None})
    quietly = nullcontext(report_sweep.SweepWarnings())
    with quietly if quiet else report_sweep.SweepBars() as progress:
        found = sweep(
            loaded, axes or loaded.sweep, folder, draws=draws, save_best=save_best, force=force,
            progress=progress,
        )  # fmt: skip
    files = report_sweep.write_report(found)
    if as_json and found.failure is None:
        report.show_json("sweep", report_sweep.sweep_json(found, files))
    elif not quiet and not as_json:
        report_sweep.show_sweep(found, files)
    if found.failure is not None:
        raise found.failure
    if found.interrupted:
        report_sweep.show_interrupted(found)
        return _CANCELLED
    return int(all(variant.verdict == "fail" for variant in found.variants))
