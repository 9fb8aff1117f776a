"""`ckptools verify`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from ckptools.cli.options import SOURCE, ModelCommand, json_option, load, set_option


def _reads_headers(parameters: Mapping[str, Any]) -> bool:
    return not (parameters["deep"] or parameters["sha256"] or parameters["recipe"])


@click.command(name="verify", cls=ModelCommand, by_headers=_reads_headers)
@click.argument("sources", type=SOURCE, nargs=-1, required=True, metavar="SRC…")
@click.option("--deep", is_flag=True, help="Read every value: NaN, Inf, zeros, range, hashes.")
@click.option("--expect", default=None, metavar="FAMILY", help="sd1, sdxl, sd1/inpainting, lora …")
@click.option("--sha256", default=None, metavar="HEX", help="Of the file; 10 digits or more.")
@click.option(
    "--recipe", type=click.Path(dir_okay=False, path_type=Path), default=None,
    help="Compute this merge again, writing nothing, and compare.",
)  # fmt: skip
@set_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress, no output but problems.")
def command(
    sources: tuple[Path, ...],
    deep: bool,
    expect: str | None,
    sha256: str | None,
    recipe: Path | None,
    settings: Mapping[str, float],
    as_json: bool,
    quiet: bool,
) -> int:
    """Is SRC sound, whole, and what it should be?

    Reads headers only, unless --deep, --sha256 or --recipe ask for more. A manifest beside the
    file is compared with it. Exits with 1 for an invalid file, with 3 for an unsafe one.

    \b
    Examples:
      ckptools verify model.safetensors --deep --expect sd1
      ckptools verify merged.safetensors --recipe recipe.yaml
      ckptools verify hf://owner/repo --expect sdxl
    """
    from ckptools import report, report_files
    from ckptools.errors import UsageError
    from ckptools.soundness import verify_source
    from ckptools.workflow import default_threads

    if len(sources) > 1 and (sha256 is not None or recipe):
        raise UsageError(
            "--sha256 and --recipe are about one file", fix="verify one file at a time"
        )
    if settings and recipe is None:
        raise UsageError("--set changes a recipe, and there is none", fix="give --recipe too")
    loaded = None if recipe is None else load(recipe, settings)
    with nullcontext() if quiet or as_json else report.BarProgress() as progress:
        found = [
            verify_source(
                path, deep=deep, expect=expect, sha256=sha256, recipe=loaded,
                threads=default_threads(), progress=progress,
            )
            for path in sources
        ]  # fmt: skip
    if as_json:
        report.show_json("verify", report_files.soundness_json(found))
    else:
        for one in found:
            if not (quiet and one.valid):
                report_files.show_soundness(one)
    if any(one.unsafe for one in found):
        return 3
    return 0 if all(one.valid for one in found) else 1
