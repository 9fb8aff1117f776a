"""`ckptools card`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckptools.cli.options import json_option


@click.command(name="card")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--repo", default="", metavar="OWNER/NAME", help="Repository that it names.")
@click.option("--license", "license_", default="", metavar="ID", help="Instead of the parents'.")
@click.option("--license-link", default="", metavar="URL", help="Where the licence's text is.")
@json_option
def command(source: Path, as_json: bool, **options: Any) -> None:
    """Print the model card that SOURCE would be published with; asks nobody.

    \b
    Example:
      ckptools card merged.safetensors --repo me/model > README.md
    """
    from ckptools import report, report_publish
    from ckptools.cli.options import published_order
    from ckptools.publication import gather, make_card_alone

    path, order = published_order(source, options | {"force_unchecked": True})
    text, licence = make_card_alone(gather(path, order))
    if as_json:
        report.show_json("card", report_publish.card_json(text, licence))
        return
    report_publish.show_card(text)
    if licence.refused:
        report.show_message(f"no licence: {licence.refused}; --license gives one")
