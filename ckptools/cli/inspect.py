"""`ckptools inspect`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from ckptools.cli.options import SOURCE, ModelCommand, json_option


@click.command(
    name="inspect", cls=ModelCommand, by_headers=lambda parameters: not parameters["stats"]
)
@click.argument("sources", metavar="SRC…", nargs=-1, required=True, type=SOURCE)
@click.option("--tensors", default="", metavar="GLOB", help="List the tensors of these names.")
@click.option(
    "--stats", is_flag=True,
    help="Read the values: norm, mean, std, min, max, zeros and NaN, by component and block.",
)  # fmt: skip
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit code says if it reads.")
def command(
    sources: tuple[Path, ...], tensors: str, stats: bool, as_json: bool, quiet: bool
) -> int:
    """Show what SRC is, whether it is whole, and where it comes from.

    Reads headers and a few small tensors, all values only with --stats. SRC is a file, an index of
    shards, a diffusers folder, a folder of files, or hf://owner/repo[/file][@revision], of which
    the headers alone are read. Several are compared in a table.

    \b
    Examples:
      ckptools inspect model.safetensors
      ckptools inspect models/
      ckptools inspect hf://owner/repo
      ckptools inspect model.safetensors --tensors "*attn2.to_k*"
      ckptools inspect model.safetensors --stats
    """
    from ckptools import report, report_inspect
    from ckptools.inspection import survey

    with nullcontext() if quiet or as_json or not stats else report.BarProgress() as progress:
        found = survey(sources, tensors=tensors, statistics=stats, progress=progress)
    if as_json:
        report.show_json("inspect", report_inspect.survey_json(found))
    elif not quiet:
        report_inspect.show_survey(found)
    return found.exit_code
