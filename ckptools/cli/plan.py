"""`ckptools plan`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from ckptools.cli.options import json_option, load, output_option, recipe_argument, set_option


@click.command(name="plan")
@recipe_argument
@set_option
@output_option
@click.option("--details", is_flag=True, help="List every tensor that is not merged, and why.")
@json_option
def command(
    recipe: Path, settings: Mapping[str, float], output: Path | None, details: bool, as_json: bool
) -> None:
    """Show what RECIPE would do, from file headers alone; writes nothing.

    \b
    Example:
      ckptools plan recipe.yaml
    """
    from ckptools import report
    from ckptools.workflow import default_threads, left_to_merge, planned

    loaded = load(recipe, settings, output)
    with planned(loaded, threads=default_threads(), force=True, headers_only=True) as plan:
        if as_json:
            report.show_json("plan", report.plan_json(plan, left_to_merge(plan)))
        else:
            report.show_plan(plan, left_to_merge(plan), details=details)
