"""`ckptools schema`."""

from __future__ import annotations

import json

import click


@click.command(name="schema")
def command() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML.

    \b
    Example:
      ckptools schema > recipe.schema.json
    """
    from ckptools.recipe import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))
