"""`ckptools methods`."""

from __future__ import annotations

import click

from ckptools.cli.options import json_option


@click.command(name="methods")
@json_option
def command(as_json: bool) -> None:
    """List the merge methods: how each is called, its formula and its source.

    \b
    Example:
      ckptools methods
    """
    from ckptools import report
    from ckptools.methods import load_methods

    if as_json:
        report.show_json("methods", {"methods": report.methods_json(load_methods())})
    else:
        report.show_methods(load_methods())
