"""`ckptools convert`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import click

from ckptools.cli.options import SOURCE, ModelCommand, json_option

_DTYPES = {"keep": "keep", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_MIN_SHARD_BYTES = 10**6


def _dtypes(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    dtypes: dict[str, str] = {}
    for text in values:
        component, equals, dtype = text.rpartition("=")
        if dtype not in _DTYPES or bool(equals) != bool(component):
            raise click.BadParameter(
                f"{text!r} is not a dtype ({', '.join(_DTYPES)}) or COMPONENT=DTYPE"
            )
        if (component or "default") in dtypes:
            raise click.BadParameter(f"two dtypes for {component or 'all'}")
        dtypes[component or "default"] = _DTYPES[dtype]
    return dtypes


def _size(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    number, unit = text[:-2], text[-2:].upper()
    if text == "0":
        return 0
    if not number.isdigit() or unit not in _UNITS or int(number) * _UNITS[unit] < _MIN_SHARD_BYTES:
        raise click.BadParameter(f"{text!r} is not a size of 1 MB or more, such as 5GB")
    return int(number) * _UNITS[unit]


@click.command(name="convert", cls=ModelCommand)
@click.argument("source", type=SOURCE)
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["single", "diffusers"]),
    default=None,
    help="What to write (default: OUTPUT's name tells).",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    metavar="[COMPONENT=]DTYPE",
    callback=_dtypes,
    help="fp16, bf16, fp32 or keep, for all or one component (repeatable).",
)
@click.option("--prune", is_flag=True, help="Leave out EMA weights and what training left behind.")
@click.option("--ema", is_flag=True, help="Take the EMA weights in place of the trained ones.")
@click.option(
    "--component",
    default="",
    metavar="NAME",
    help="Only this one: unet, text_encoder, text_encoder_2, vae …",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="A diffusers folder that gives settings and tokenizers.",
)
@click.option(
    "--shard-size",
    "shard_bytes",
    metavar="SIZE",
    callback=_size,
    default=None,
    help="Largest file, such as 5GB (default: 10GB in a folder, else no limit; 0: none).",
)
@click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and Inf.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Warnings and errors only.")
def command(
    source: Path,
    output: Path,
    to: str | None,
    dtypes: Mapping[str, str],
    prune: bool,
    ema: bool,
    component: str,
    config: Path | None,
    shard_bytes: int | None,
    allow_nonfinite: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert SOURCE between single file and diffusers folder, dtypes, and whole and part.

    \b
    OUTPUT that ends in .safetensors is a single file, any other name a diffusers folder.

    \b
    Examples:
      ckptools convert model.ckpt model.safetensors --prune --dtype fp16
      ckptools convert model.safetensors model-diffusers
      ckptools convert model-diffusers model.safetensors --dtype unet=fp16 --dtype vae=fp32
      ckptools convert model.safetensors vae.safetensors --component vae
      ckptools convert hf://owner/repo model.safetensors
    """  # fmt: skip
    from ckptools import report, report_convert
    from ckptools.convert import Request, convert, planned

    request = Request(
        source, output, to=to or "", dtypes=dtypes, prune=prune, ema=ema, component=component,
        config=config, shard_bytes=shard_bytes, allow_nonfinite=allow_nonfinite, force=force,
    )  # fmt: skip
    if dry_run:
        with planned(request) as conversion:
            report_convert.show_warnings(conversion)
            if as_json:
                body = {**report_convert.conversion_json(conversion), "dry_run": True}
                report.show_json("convert", body)
            elif not quiet:
                report_convert.show_conversion(conversion, is_done=False)
        return
    with nullcontext() if quiet else report.BarProgress() as progress:
        result = convert(request, progress=progress)
    report_convert.show_warnings(result.conversion)
    if as_json:
        body = {**report_convert.result_json(result), "dry_run": False}
        report.show_json("convert", body)
    elif not quiet:
        report_convert.show_result(result)
