"""`ckptools hash`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from ckptools.cli.options import SOURCE, ModelCommand, json_option


@click.command(name="hash", cls=ModelCommand)
@click.argument("sources", type=SOURCE, nargs=-1, required=True, metavar="SRC…")
@click.option("--no-cache", is_flag=True, help="Read the files even if they were hashed before.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(sources: tuple[Path, ...], no_cache: bool, as_json: bool, quiet: bool) -> None:
    """Show every hash that SRC is known by, and whether those in its metadata are right.

    One read gives sha256, AutoV1, AutoV2, AutoV3, CRC32, ModelSpec's hash, and a hash of each
    component that depends on its values alone, not on order, metadata or layout.

    \b
    Examples:
      ckptools hash model.safetensors
      ckptools hash a.safetensors b.safetensors --json
      ckptools hash hf://owner/repo/model.safetensors
    """
    from ckptools import report, report_files
    from ckptools.hashing import hash_source

    with nullcontext() if quiet or as_json else report.BarProgress() as progress:
        found = [hash_source(path, use_cache=not no_cache, progress=progress) for path in sources]
    if as_json:
        report.show_json("hash", report_files.hashes_json(found))
        return
    for one in found:
        report_files.show_hashes(one)
