"""`ckptools lock`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from ckptools.cli.options import json_option, load, recipe_argument


@click.command(name="lock")
@recipe_argument
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress, no output but errors.")
def command(recipe: Path, as_json: bool, quiet: bool) -> None:
    """Write down which files RECIPE means: commit, sha256 and size of every model and adapter.

    They go to recipe.lock.yaml beside it, which `ckptools merge --locked` holds them against.
    Models on the Hub are looked up, not downloaded; files of this machine are read.

    \b
    Example:
      ckptools lock recipe.yaml
      ckptools merge recipe.yaml --locked
    """
    from ckptools import report, report_sources
    from ckptools.hub.lock import lock_path, make_lock, write_lock
    from ckptools.progress import Progress

    loaded = load(recipe, {})
    with nullcontext(Progress()) if quiet or as_json else report.BarProgress() as progress:
        lock = make_lock(loaded, progress)
    write_lock(lock, recipe)
    if as_json:
        report.show_json("lock", report_sources.lock_json(lock, recipe))
    elif not quiet:
        report_sources.show_lock(lock, lock_path(recipe))
