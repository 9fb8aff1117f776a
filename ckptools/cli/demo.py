"""`ckptools demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ckptools.recipe import Recipe


@click.command(name="demo")
@click.option(
    "-o", "--output", "folder", type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"), show_default=True, help="Folder to write to.",
)  # fmt: skip
def command(folder: Path) -> None:
    """Merge the tiny models that come with ckptools, check the merge and draw with it.

    Plans, explains, merges, checks, draws the merge beside its parents, and sweeps over its
    parameter: two minutes on a processor. Without the `render` extra it ends with the merge.

    \b
    Example:
      ckptools demo
    """
    from ckptools import report
    from ckptools.errors import Interrupted
    from ckptools.workflow import demo_recipe, find_step, merge, planned

    recipe = demo_recipe(folder)
    report.show_line(f"recipe: {recipe.path}")
    for line in recipe.path.read_text(encoding="utf-8").splitlines():
        report.show_line(line)
    with planned(recipe, threads=2, force=True) as plan:
        report.show_plan(plan)
        report.show_explanation(plan, find_step(plan, "*output_blocks.5.1*attn2.to_k.weight"))
    with report.BarProgress() as progress:
        result = merge(recipe, force=True, progress=progress)
    report.show_merge(result)
    try:
        _go_on(recipe, result.output, folder)
    except Interrupted:
        raise
    except KeyboardInterrupt as exc:
        raise Interrupted(f"interrupted; the merge is kept in {folder}") from exc


def _go_on(recipe: Recipe, merged: Path, folder: Path) -> None:
    """Check the merge and draw with it, where that can be."""
    from ckptools import report
    from ckptools.errors import Interrupted, UsageError
    from ckptools.rendering import Order, check_order
    from ckptools.workflow import render_recipe

    try:
        check_order(Order())
    except UsageError as exc:
        report.show_line("")
        report.show_line(f"To check the merge and to draw with it: {exc.fix}, and run this again.")
        return

    from ckptools import report_check, report_render, report_sweep
    from ckptools.checking import check_source
    from ckptools.sweep import Draws, sweep

    models = {name: recipe.file_of(ref) for name, ref in recipe.models.items()}
    report.show_line("")
    report.show_line("Does it still work?")
    checked = check_source(
        merged, against=(models["A"], models["B"]), base=models["C"],
        tell=report.show_message,
    )  # fmt: skip
    report_check.show_check(checked)
    report.show_line("")
    report.show_line("What does it draw, beside its parents?")
    with report_render.PictureProgress() as pictures:
        drawn = render_recipe(recipe, folder=folder / "pictures", progress=pictures)
    report_render.show_rendering(drawn)
    if drawn.interrupted:
        raise Interrupted(f"interrupted; {drawn.kept}, and the merge in {folder}")
    report.show_line("")
    report.show_line("And at other values of M?")
    with report_sweep.SweepBars() as bars:
        swept = sweep(
            recipe, recipe.sweep, folder / "sweep", draws=Draws(seeds=(1,)), force=True,
            progress=bars,
        )  # fmt: skip
    report_sweep.show_sweep(swept, report_sweep.write_report(swept))
    if swept.interrupted:
        raise Interrupted(f"interrupted; what was done is kept in {folder}")
