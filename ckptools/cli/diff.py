"""`ckptools diff`."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import click

from ckptools.cli.options import json_option


@click.command(name="diff")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--structure", is_flag=True, help="Compare names, shapes and dtypes alone.")
@click.option(
    "--explain-by", multiple=True, type=click.Path(path_type=Path), metavar="C",
    help="Fit B as a combination of A and this model (repeatable; the second is D).",
)  # fmt: skip
@click.option("--top", default=10, metavar="N", type=click.IntRange(min=0), show_default=True,
              help="List the N tensors that changed most.")  # fmt: skip
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="Also write a page to look at in a browser.")  # fmt: skip
@click.option("--exit-code", is_flag=True, help="Exit with 1 where the models differ.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; implies --exit-code.")
def command(
    a: Path, b: Path, structure: bool, explain_by: tuple[Path, ...], top: int, html: Path | None,
    exit_code: bool, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Show how model B differs from model A, and what the change is.

    Single files, pickles and diffusers folders are compared under the same names, as numbers.

    \b
    Examples:
      ckptools diff base.safetensors tuned.safetensors
      ckptools diff model.safetensors folder/ --exit-code
      ckptools diff A.safetensors merge.safetensors --explain-by C.safetensors
      ckptools diff A.safetensors B.safetensors --html report.html
    """
    if "numpy" not in sys.modules:  # small matrices: its threads would wait for one another
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from ckptools import report, report_diff
    from ckptools.diff import compare
    from ckptools.errors import UsageError

    if structure and explain_by:
        raise UsageError("--structure reads no values, --explain-by needs them",
                         fix="leave one of them out")  # fmt: skip
    if html is not None:
        report_diff.check_html(html)
    with nullcontext() if quiet or as_json else report.BarProgress() as progress:
        found = compare(a, b, structure=structure, explain_by=explain_by, progress=progress)
    if html is not None:
        report_diff.write_html(found, html, quiet=quiet)
    if as_json:
        report.show_json("diff", report_diff.diff_json(found, top=top))
    elif not quiet:
        report_diff.show_diff(found, top=top)
    return int(not found.same and (exit_code or quiet))
