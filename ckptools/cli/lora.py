"""`ckptools lora`: inspect, check, extract, resize, merge."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click

from ckptools.cli.options import SOURCE, ModelCommand, json_option

F = TypeVar("F", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)


def _output(function: F) -> F:
    return click.option("-o", "--output", type=_FILE, required=True, help="File to write.")(
        function
    )


def _force(function: F) -> F:
    return click.option("-f", "--force", is_flag=True, help="Replace an existing output.")(function)


def _quiet(function: F) -> F:
    return click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")(function)


def _energy(function: F) -> F:
    return click.option(
        "--energy", type=float, default=None, metavar="0.9",
        help="Keep as many singular values as hold this share of the squared norm.",
    )(function)  # fmt: skip


def _names(function: F) -> F:
    return click.option(
        "--names", type=click.Choice(["kohya", "peft"]), default=None,
        help="Naming scheme to write (default: the input's).",
    )(function)  # fmt: skip


def _model(function: F) -> F:
    return click.option(
        "--model", type=SOURCE, default=None, metavar="MODEL",
        help="A model that the files fit: needed to change names.",
    )(function)  # fmt: skip


def _dtype(default: str | None) -> Callable[[F], F]:
    told = "" if default else " (default: the input's)"
    return click.option(
        "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default=default,
        show_default=bool(default), help=f"Dtype of the weights{told}.",
    )  # fmt: skip


def _bar(*, hidden: bool) -> AbstractContextManager[Any]:
    from ckptools import report

    return nullcontext() if hidden else report.BarProgress()


@click.group(name="lora")
def command() -> None:
    """Look at adapters (LoRA and its kin), and make them.

    \b
    Examples:
      ckptools lora inspect detail.safetensors
      ckptools lora check detail.safetensors --against model.safetensors
    """


@command.command(name="inspect", cls=ModelCommand, by_headers=lambda parameters: True)
@click.argument("file", type=SOURCE)
@json_option
def inspect_(file: Path, as_json: bool) -> None:
    """Show what FILE is: kind, base, ranks, alphas, targets, trigger words, training.

    \b
    Examples:
      ckptools lora inspect detail.safetensors
      ckptools lora inspect hf://owner/repo
    """
    from ckptools import report, report_adapters
    from ckptools.adapters.inspection import inspect_adapter

    with _bar(hidden=as_json) as progress:
        found = inspect_adapter(file, progress=progress)
    if as_json:
        report.show_json("lora-inspect", report_adapters.inspection_json(found))
    else:
        report_adapters.show_inspection(found)


@command.command(name="check", cls=ModelCommand)
@click.argument("file", type=SOURCE)
@click.option("--against", type=SOURCE, required=True, metavar="MODEL", help="The model.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def check_(file: Path, against: Path, as_json: bool, quiet: bool) -> int:
    """Does FILE fit MODEL, how much of it does it change, and how strongly?

    Exits with 1 if any module matches nothing or does not fit.

    \b
    Example:
      ckptools lora check detail.safetensors --against model.safetensors
    """
    from ckptools import report, report_adapters
    from ckptools.adapters.check import check_adapter

    with _bar(hidden=quiet or as_json) as progress:
        found = check_adapter(file, against, progress=progress)
    if as_json:
        report.show_json("lora-check", report_adapters.check_json(found))
    else:
        report_adapters.show_check(found)
    return 0 if found.fits else 1


@command.command(name="extract", cls=ModelCommand)
@click.argument("a", type=SOURCE)
@click.argument("b", type=SOURCE)
@_output
@click.option("--rank", type=int, default=None, help="Rank of every module (default: 32).")
@_energy
@click.option(
    "--names", type=click.Choice(["kohya", "peft"]), default="kohya", show_default=True,
    help="Naming scheme to write.",
)  # fmt: skip
@_dtype("fp16")
@click.option(
    "--with-diff", is_flag=True, help="Hold norms, biases and embeddings as whole differences."
)
@_force
@json_option
@_quiet
def extract_(
    a: Path,
    b: Path,
    output: Path,
    rank: int | None,
    energy: float | None,
    names: Any,
    dtype: str,
    with_diff: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the LoRA that takes model A to model B, and say what it misses.

    \b
    Examples:
      ckptools lora extract base.safetensors tuned.safetensors -o style.safetensors --rank 64
      ckptools lora extract base.safetensors tuned.safetensors -o style.safetensors --energy 0.95
    """
    from ckptools import report, report_adapters
    from ckptools.adapters.extract import extract
    from ckptools.adapters.factors import DEFAULT_RANK, Budget

    budget = Budget(DEFAULT_RANK if rank is None and energy is None else rank, energy)
    with _bar(hidden=quiet or as_json) as progress:
        done = extract(
            a, b, output, budget=budget, names=names, dtype=dtype, with_diff=with_diff,
            force=force, progress=progress,
        )  # fmt: skip
    if as_json:
        report.show_json("lora-extract", report_adapters.extraction_json(done))
    elif not quiet:
        report_adapters.show_extraction(done)


@command.command(name="resize", cls=ModelCommand)
@click.argument("file", type=SOURCE)
@_output
@click.option("--rank", type=int, default=None, help="Largest rank to keep.")
@_energy
@_names
@_model
@_dtype(None)
@_force
@json_option
@_quiet
def resize_(
    file: Path,
    output: Path,
    rank: int | None,
    energy: float | None,
    names: Any,
    model: Path | None,
    dtype: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write FILE with smaller ranks, by the singular values of its factors.

    \b
    Example:
      ckptools lora resize big.safetensors -o small.safetensors --rank 16
    """
    from ckptools import report, report_adapters
    from ckptools.adapters.factors import Budget
    from ckptools.adapters.rewrite import resize

    budget = Budget(rank, energy)
    with _bar(hidden=quiet or as_json) as progress:
        done = resize(
            file, output, budget=budget, names=names, model=model, dtype=dtype, force=force,
            progress=progress,
        )  # fmt: skip
    if as_json:
        report.show_json("lora-resize", report_adapters.rewritten_json(done))
    elif not quiet:
        report_adapters.show_rewritten(done)


def _weights(_: click.Context, __: click.Parameter, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not numbers with commas, such as 1,0.5") from None


@command.command(name="merge", cls=ModelCommand)
@click.argument("files", type=SOURCE, nargs=-1, required=True)
@click.option("--weights", callback=_weights, metavar="1,0.5", help="One for each file.")
@_output
@click.option("--rank", type=int, default=None, help="Recompress to this rank.")
@_energy
@_names
@_model
@_dtype(None)
@_force
@json_option
@_quiet
def merge_(
    files: tuple[Path, ...],
    weights: list[float] | None,
    output: Path,
    rank: int | None,
    energy: float | None,
    names: Any,
    model: Path | None,
    dtype: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write one LoRA that does what FILES do together: exactly (ranks add), or recompressed.

    With one file, --names and --model it renames.

    \b
    Examples:
      ckptools lora merge a.safetensors b.safetensors --weights 1,0.5 -o both.safetensors
      ckptools lora merge old.safetensors --names peft --model model.safetensors -o new.safetensors
    """
    from ckptools import report, report_adapters
    from ckptools.adapters.factors import Budget
    from ckptools.adapters.rewrite import concatenate

    budget = None if rank is None and energy is None else Budget(rank, energy)
    done = concatenate(
        files, output, weights=weights, budget=budget, names=names, model=model, dtype=dtype,
        force=force,
    )  # fmt: skip
    if as_json:
        report.show_json("lora-merge", report_adapters.rewritten_json(done))
    elif not quiet:
        report_adapters.show_rewritten(done)
