"""`ckptools demo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="demo")
@click.option(
    "-o", "--output", "folder", type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"), show_default=True, help="Folder to write to.",
)  # fmt: skip
def command(folder: Path) -> None:
    """Merge the tiny models that come with ckptools: plan, explain, merge.

    \b
    Example:
      ckptools demo
    """
    from ckptools import report
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
