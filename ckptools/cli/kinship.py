"""`ckptools kinship`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from ckptools.cli.options import SOURCE, ModelCommand, json_option


@click.command(name="kinship", cls=ModelCommand)
@click.argument("models", type=SOURCE, nargs=-1, required=True, metavar="MODEL…")
@click.option("--base", type=SOURCE, default=None, help="What they, or the adapter, came from.")
@click.option("--for", "adapter", type=SOURCE, default=None, help="A LoRA or ControlNet.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    models: tuple[Path, ...], base: Path | None, adapter: Path | None, as_json: bool, quiet: bool
) -> int:
    """How near relatives are MODELs? Adapters and ControlNets work on near kin only.

    With --base, also whether they went the same way from there. With --for, whether an adapter
    suits the models; --base is then the model that it was trained on. Exits with 1 if they are
    no kin.

    \b
    Examples:
      ckptools kinship a.safetensors b.safetensors --base sd15.safetensors
      ckptools kinship a.safetensors hf://owner/repo
      ckptools kinship model.safetensors --for detail.safetensors --base sd15.safetensors
    """
    from ckptools import report, report_files
    from ckptools.kinship import KIN, compare_models
    from ckptools.workflow import default_threads

    with nullcontext() if quiet or as_json else report.BarProgress() as progress:
        found = compare_models(
            models, base=base, adapter=adapter, threads=default_threads(), progress=progress
        )
    if as_json:
        report.show_json("kinship", report_files.kinship_json(found))
    else:
        report_files.show_kinship(found)
    return 0 if found.verdict in KIN else 1
