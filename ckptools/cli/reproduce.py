"""`ckptools reproduce`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import click

from ckptools.cli.options import json_option


def _models(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for text in values:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise click.BadParameter(f"{text!r} is not NAME=PATH, such as A=a.safetensors")
        models[name] = Path(path)
    return models


@click.command(name="reproduce")
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option(
    "--model", "models", multiple=True, metavar="NAME=PATH", callback=_models,
    help="Where a model lies now (repeatable); others are looked for beside MANIFEST.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=None,
    metavar="FOLDER", help="Keep the result in this folder.",
)  # fmt: skip
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit code tells.")
def command(
    manifest: Path, models: Mapping[str, Path], output: Path | None, as_json: bool, quiet: bool
) -> int:
    """Merge again what MANIFEST describes, and compare: 0 same, 1 not.

    MANIFEST is the .ckptools.json beside a merged model, or hf://owner/repo of a published one.
    Models on the Hub are fetched at the commit of the merge.

    \b
    Examples:
      ckptools reproduce merged.safetensors.ckptools.json
      ckptools reproduce hf://owner/merged
      ckptools reproduce merged.safetensors.ckptools.json --model A=../models/a.safetensors
    """
    from ckptools import report, report_sources
    from ckptools.reproduce import reproduce

    with nullcontext() if quiet or as_json else report.BarProgress() as progress:
        found = reproduce(manifest, models=models, output=output, progress=progress)
    if as_json:
        report.show_json("reproduce", report_sources.reproduction_json(found))
    elif not quiet:
        report_sources.show_reproduction(found)
    return 0 if found.same else 1
