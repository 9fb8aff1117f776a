"""`ckptools merge`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckptools.cli.options import json_option, load, output_option, recipe_argument, set_option

if TYPE_CHECKING:
    from ckptools.hub.lock import Lock


def locked_files(recipe: Path, settings: Mapping[str, float]) -> Lock:
    """The lock of a recipe, which fixes its numbers, too."""
    from ckptools.errors import UsageError
    from ckptools.hub.lock import read_lock

    if settings:
        raise UsageError(
            "--locked merges what was locked, and --set changes it", fix="leave one of them out"
        )
    return read_lock(recipe)


@click.command(name="merge")
@recipe_argument
@set_option
@output_option
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--threads", type=click.IntRange(1, 64), default=None,
    help="Worker threads (default: the cores and one, 3 to 8). The result does not depend on it.",
)  # fmt: skip
@click.option("--locked", is_flag=True, help="Merge the files of recipe.lock.yaml, and no others.")
@click.option("--hash-inputs", is_flag=True, help="Record the sha256 of every input.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Warnings and errors only.")
def command(
    recipe: Path,
    settings: Mapping[str, float],
    output: Path | None,
    force: bool,
    threads: int | None,
    locked: bool,
    hash_inputs: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Merge by RECIPE into one verified .safetensors file.

    \b
    Examples:
      ckptools merge recipe.yaml
      ckptools merge recipe.yaml --set M=0.5 -o half.safetensors
      ckptools merge recipe.yaml --locked
    """
    from ckptools import report, report_render
    from ckptools.workflow import merge

    loaded = load(recipe, settings, output)
    lock = locked_files(recipe, settings) if locked else None
    pictures = report_render.PictureProgress()
    with (
        nullcontext(report.WarningsOnly()) if quiet else report.BarProgress() as progress,
        pictures,
    ):
        result = merge(
            loaded, threads=threads, force=force, hash_inputs=hash_inputs, lock=lock,
            progress=progress, pictures=None if quiet else pictures,
        )  # fmt: skip
    if as_json:
        report.show_json("merge", report.merge_json(result))
    elif not quiet:
        report.show_merge(result)
        if result.rendering is not None:
            report_render.show_rendering(result.rendering)
    return int(result.rendering is not None and result.rendering.verdict == "fail")
