"""`ckptools inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from ckptools.cli.options import json_option


@click.command(name="inspect")
@click.argument("sources", metavar="SRC…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tensors", default="", metavar="GLOB", help="List the tensors of these names.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit code says if it reads.")
def command(sources: tuple[Path, ...], tensors: str, as_json: bool, quiet: bool) -> int:
    """Show what SRC is, whether it is whole, and where it comes from.

    Reads headers and a few small tensors. SRC is a file, an index of shards, a diffusers folder,
    or a folder of files. Several are compared in a table.

    \b
    Examples:
      ckptools inspect model.safetensors
      ckptools inspect models/
      ckptools inspect model.safetensors --tensors "*attn2.to_k*"
    """
    from ckptools import report, report_inspect
    from ckptools.inspection import survey

    found = survey(sources, tensors=tensors)
    if as_json:
        report.show_json("inspect", report_inspect.survey_json(found))
    elif not quiet:
        report_inspect.show_survey(found)
    return found.exit_code
