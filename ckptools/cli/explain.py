"""`ckptools explain`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from ckptools.cli.options import json_option, load, recipe_argument, set_option


@click.command(name="explain")
@recipe_argument
@click.argument("tensor")
@set_option
@json_option
def command(recipe: Path, tensor: str, settings: Mapping[str, float], as_json: bool) -> None:
    """Show the formula with its numbers for one TENSOR, and which line set each.

    TENSOR is a name, or a glob or a part of one that fits a single tensor.

    \b
    Example:
      ckptools explain recipe.yaml "*input_blocks.4.1*attn2.to_k.weight"
    """
    from ckptools import report
    from ckptools.workflow import default_threads, find_step, planned

    loaded = load(recipe, settings)
    with planned(loaded, threads=default_threads(), force=True, headers_only=True) as plan:
        step = find_step(plan, tensor)
        if as_json:
            report.show_json("explain", report.explain_json(plan, step))
        else:
            report.show_explanation(plan, step)
