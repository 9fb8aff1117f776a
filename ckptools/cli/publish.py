"""`ckptools publish`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from ckptools.cli.options import json_option


@click.command(name="publish")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--repo", default="", metavar="OWNER/NAME", help="Repository; made where missing.")
@click.option("--dry-run", is_flag=True, help="Show what would be done; send nothing.")
@click.option("--public", is_flag=True, help="Make it, or let it be, for everybody to see.")
@click.option("--pr", "as_pull_request", is_flag=True, help="Open a pull request instead.")
@click.option("--branch", default="", help="Branch to commit to (default: main).")
@click.option("--tag", default="", help="Tag to set on the commit, such as v1.")
@click.option("-m", "--message", default="", help="Of the commit.")
@click.option("--license", "license_", default="", metavar="ID", help="Instead of the parents'.")
@click.option("--license-link", default="", metavar="URL", help="Where the licence's text is.")
@click.option(
    "--force-unchecked", is_flag=True,
    help="Publish what `verify` or its test render found bad.",
)  # fmt: skip
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress, no output but problems.")
def command(source: Path, dry_run: bool, as_json: bool, quiet: bool, **options: Any) -> int:
    """Publish SOURCE on the Hugging Face Hub: one commit, private unless --public.

    SOURCE is a merged file, the index of its shards, a diffusers folder, or a recipe whose output
    is there. With it go its card, recipe, manifest, licence text and test render. The token is
    that of `hf auth login` or HF_TOKEN. --dry-run shows what is known without the Hub, too, and
    then exits with 4; with HF_HUB_OFFLINE=1 it asks nothing and exits with 0.

    \b
    Examples:
      ckptools publish merged.safetensors --repo me/model --dry-run
      ckptools publish recipe.yaml --public --tag v1
    """
    import sys

    from ckptools import report, report_publish
    from ckptools.cli.options import published_order
    from ckptools.hub.upload import connect
    from ckptools.publication import gather, make_publication, publish

    path, order = published_order(source, options)
    hub = connect(
        report.show_message, quiet=quiet or as_json or not sys.stderr.isatty(), patient=not dry_run
    )
    with nullcontext() if quiet or as_json else report.BarProgress() as progress:
        gathered = gather(path, order, progress=progress)
    if dry_run:
        publication = make_publication(gathered, hub, dry_run=True)
        if as_json:
            report.show_json("publish", report_publish.publication_json(publication))
        elif not quiet:
            report_publish.show_publication(publication)
        if publication.problem is None:
            return 0
        if not as_json:
            report.show_error(publication.problem)
        return publication.problem.exit_code
    published = publish(gathered, hub)
    if as_json:
        report.show_json("publish", report_publish.published_json(published))
    elif not quiet:
        report_publish.show_published(published)
    return 0
