"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class _Source(click.Path):
    """A model: a path, or `hf://owner/repo[/file][@revision]`."""


SOURCE = _Source(path_type=Path)


class ModelCommand(click.Command):
    """A command whose models may lie on the Hub: those are fetched before it runs.

    Looks at parameters of the type `SOURCE`, all through one session, so that a branch means one
    commit for all of them. What was fetched before is in the Hub's cache.

    by_headers  whether, with these parameters, the command reads headers of models on the Hub
                itself: then they are not fetched
    """

    def __init__(
        self,
        *args: Any,
        by_headers: Callable[[Mapping[str, Any]], bool] = lambda parameters: False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._by_headers = by_headers

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with paths of this machine."""
        if not self._by_headers(ctx.params):
            self._fetch(ctx.params)
        return super().invoke(ctx)

    def _fetch(self, parameters: dict[str, Any]) -> None:
        from ckptools.hubref import hub_ref_of, is_local

        names = [one.name for one in self.params if isinstance(one.type, _Source) and one.name]
        given = {name: parameters[name] for name in names if parameters[name]}
        places = {name: value if isinstance(value, tuple) else (value,)
                  for name, value in given.items()}  # fmt: skip
        if all(is_local(place) for value in places.values() for place in value):
            return
        from ckptools import report
        from ckptools.hub.remote import Hub

        quiet = parameters.get("quiet") or parameters.get("as_json")
        with nullcontext() if quiet else report.BarProgress() as progress:
            hub = Hub(progress)
            for name, value in places.items():
                refs = [(place, hub_ref_of(place)) for place in value]
                found = tuple(hub.fetch(ref) if ref else place for place, ref in refs)
                parameters[name] = found if isinstance(given[name], tuple) else found[0]


def _settings(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    settings: dict[str, float] = {}
    for text in values:
        name, equals, number = text.partition("=")
        if name in settings:
            raise click.BadParameter(f"{name!r} is given twice")
        try:
            settings[name] = float(number)
        except ValueError:
            settings[name] = math.nan
        if not equals or not name or not math.isfinite(settings[name]):
            raise click.BadParameter(f"{text!r} is not NAME=NUMBER, such as M=0.5")
    return settings


def recipe_argument(function: F) -> F:
    """The recipe's path."""
    kind = click.Path(dir_okay=False, path_type=Path)
    return click.argument("recipe", type=kind)(function)


def set_option(function: F) -> F:
    """`--set NAME=NUMBER`: a parameter's number for this run."""
    return click.option(
        "--set", "settings", multiple=True, metavar="NAME=NUMBER", callback=_settings,
        help="Use this number for a parameter, in place of its number or selectors (repeatable).",
    )(function)  # fmt: skip


def json_option(function: F) -> F:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(function)


def output_option(function: F) -> F:
    """`-o/--output`."""
    return click.option(
        "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=None,
        help="Write here instead of the recipe's output path.",
    )(function)  # fmt: skip


def load(recipe: Path, settings: Mapping[str, float], output: Path | None = None) -> Any:
    """The recipe with the command line's changes."""
    from ckptools.errors import UsageError
    from ckptools.filetypes import as_safetensors
    from ckptools.hubref import ADDRESS_FIX, is_address
    from ckptools.plan import outline_errors
    from ckptools.recipe import load_recipe

    if output is not None and is_address(str(output)):
        what = f"the output {str(output)!r} is no path of this machine"
        raise UsageError(what, where="--output", fix=ADDRESS_FIX)
    if output is not None and output.suffix != ".safetensors":
        raise UsageError(
            f"the output {str(output)!r} does not end in .safetensors",
            where="--output",
            fix=f"write {str(as_safetensors(output))!r}",
        )
    if output is not None and not _is_text(output):
        raise UsageError(
            f"the output {str(output)!r} is no text in UTF-8", where="--output",
            fix="choose another name",
        )  # fmt: skip
    return load_recipe(recipe, overrides=settings, output=output, further=outline_errors)


def _is_text(path: Path) -> bool:
    """Whether a name is one in letters: systems hand bytes that are none on as half characters."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def published_order(source: Path, options: Mapping[str, Any]) -> tuple[Path, Any]:
    """(the model's file or folder, what is to be done with it) for `publish` and `card`.

    A recipe stands for its output, and its `publish:` for options that are not given.
    """
    from dataclasses import replace

    from ckptools.errors import InputError
    from ckptools.publication import Order, order_of
    from ckptools.recipe import load_recipe

    order, path = Order(), source
    if source.suffix in (".yaml", ".yml"):
        recipe = load_recipe(source)
        order, path = order_of(recipe), recipe.output_path
        if recipe.output.shard_bytes and not path.exists():
            path = path.with_name(path.name + ".index.json")
        if not path.exists():
            raise InputError(
                "the recipe's output is not there", where=str(path),
                fix=f"make it: ckptools merge {source}",
            )  # fmt: skip
    given = {"license" if name == "license_" else name: value for name, value in options.items()}
    return path, replace(order, **{name: value for name, value in given.items() if value})
