"""`ckptools check`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from ckptools.cli.options import SOURCE, ModelCommand, json_option, load, set_option


@click.command(name="check", cls=ModelCommand)
@click.argument("source", type=SOURCE, metavar="SRC")
@click.option(
    "--against", type=SOURCE, multiple=True, metavar="PARENT",
    help="A model that SRC was merged from, or should be like (repeatable).",
)  # fmt: skip
@click.option("--base", type=SOURCE, default=None, help="What the parents were trained from.")
@click.option(
    "--with", "draws", type=SOURCE, default=None, metavar="MODEL",
    help="The model that a ControlNet is checked on.",
)  # fmt: skip
@click.option(
    "--config", type=click.Path(file_okay=False, path_type=Path), default=None,
    help="A diffusers folder (its JSON files are enough), for models of unusual width.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Draw nothing, load no parent: seconds, fewer checks.")
@set_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress, nothing but what does not pass.")
def command(
    source: Path,
    against: tuple[Path, ...],
    base: Path | None,
    draws: Path | None,
    config: Path | None,
    quick: bool,
    settings: Mapping[str, float],
    as_json: bool,
    quiet: bool,
) -> int:
    """Does a merged model still work?

    SRC is a model, or a recipe (.yaml), whose merge is then made in memory and held against the
    recipe's models. Exits with 1 if a check fails; warnings are no failure.

    \b
    Examples:
      ckptools check merged.safetensors --against a.safetensors --against b.safetensors
      ckptools check recipe.yaml --set M=0.7
      ckptools check merged.safetensors --quick --json
      ckptools check canny.safetensors --with model.safetensors
    """
    from ckptools import checking, report, report_check
    from ckptools.errors import UsageError
    from ckptools.workflow import default_threads

    tell = (lambda stage: None) if quiet or as_json else report.show_message
    threads = default_threads()
    if source.suffix.lower() in (".yaml", ".yml"):
        if against or base:
            raise UsageError("a recipe says itself what its parents are", fix="leave them out")
        recipe = load(source, settings)
        found = checking.check_recipe(
            recipe, draws=draws, config=config, quick=quick, threads=threads, tell=tell
        )
    else:
        if settings:
            raise UsageError("--set changes a recipe, and SRC is none", fix="give a recipe")
        found = checking.check_source(
            source, against=against, base=base, draws=draws, config=config, quick=quick,
            threads=threads, tell=tell,
        )  # fmt: skip
    if as_json:
        report.show_json("check", report_check.check_json(found))
    else:
        report_check.show_check(found, quiet=quiet)
    return 1 if found.report.verdict == "fail" else 0
