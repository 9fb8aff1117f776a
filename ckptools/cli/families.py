"""`ckptools families`."""

from __future__ import annotations

import click

from ckptools.cli.options import json_option


@click.command(name="families")
@json_option
def command(as_json: bool) -> None:
    """List the model families that are recognised.

    \b
    Example:
      ckptools families
    """
    from ckptools import report
    from ckptools.family import load_families

    if as_json:
        report.show_json("families", {"families": report.families_json(load_families())})
    else:
        report.show_families(load_families())
